"""Frozen vision-language models from Hugging Face transformers: CLIP, SigLIP and BLIP's retrieval model."""

import json
import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
import transformers

from models.backbones.openclip import Frozen, first_sentence, not_weights, quietly
from utils.config import HOME
from utils.errors import UserError

transformers.logging.disable_progress_bar()  # it also appears for files on this disk
BILINEAR = 2  # Pillow's constant, which image processors store


class Family(NamedTuple):
    model: str  # class in transformers
    image: Callable  # model, pixels -> (N, D)
    text: Callable  # model, tokens -> (M, D)
    dim: Callable  # config -> D
    preprocess: dict  # what differs from OpenAI's, for weights without an image processor
    padding: str = "longest"  # for towers that ignore padding, by a causal or a padding mask


def _blip_text(model, tokens):
    mask = tokens != model.config.text_config.pad_token_id
    return model.text_proj(model.text_encoder(tokens, attention_mask=mask.long())[0][:, 0])


# Composed of the towers: `get_image_features` returns another type in each major version.
FAMILIES = {
    "clip": Family(
        "CLIPModel",
        lambda model, pixels: model.visual_projection(model.vision_model(pixels).pooler_output),
        lambda model, tokens: model.text_projection(model.text_model(tokens).pooler_output),
        lambda config: config.projection_dim,
        {},
    ),
    "siglip": Family(
        "SiglipModel",
        lambda model, pixels: model.vision_model(pixels).pooler_output,
        lambda model, tokens: model.text_model(tokens).pooler_output,
        lambda config: config.vision_config.hidden_size,
        {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"},
        "max_length",  # as in its training, which has no mask
    ),
    "blip": Family(
        "BlipForImageTextRetrieval",
        lambda model, pixels: model.vision_proj(model.vision_model(pixels)[0][:, 0]),
        _blip_text,
        lambda config: config.image_text_hidden_size,
        {"resize_mode": "squash"},
    ),
}


class HuggingFace(Frozen):
    """A frozen model of transformers, its image transform and its tokenizer.

    config: an Encoder. Raises UserError for any other family, and for weights or a configuration that cannot be loaded.
    """

    def __init__(self, config, device="cpu"):
        self.name = _name_or_folder(config)
        try:
            settings = quietly(lambda: _configuration(config, self.name))
            self.family = FAMILIES.get(settings.model_type)
            if self.family is None:
                raise UserError(f"{config.model} is a '{settings.model_type}'; supported are {', '.join(FAMILIES)}.")
            cls = getattr(transformers, self.family.model)
            torch.manual_seed(0)  # random weights are the same in every process
            model = cls(settings) if self.name is None else quietly(lambda: _load(cls, config, self.name))
        except UserError:
            raise
        except Exception as error:  # whatever the hub's client or a file's parser raises
            hint = "check the connection, or name a folder that holds it with --set encoder.pretrained=FOLDER."
            if config.weights_file:
                hint = not_weights(config.weights_file) or hint
            raise UserError(f"{config.model} does not load ({first_sentence(error)}): {hint}") from None
        size = settings.vision_config.image_size
        preprocess = self.family.preprocess | _processor(self.name, config, size) | {"size": size}
        super().__init__(config, device, model.float(), preprocess, self.family.dim(settings))

    @cached_property
    def tokenizer(self):
        """The tokenizer, loaded at first use; raises UserError if it cannot be loaded."""
        name = self.config.tokenizer or self.name
        if name is None:
            raise UserError(
                f"{self.config.model} with random weights has no tokenizer: name one with --set"
                " encoder.tokenizer=FOLDER."
            )
        one_end_token = self.family.padding == "max_length"
        return self._load_tokenizer(
            name, lambda: transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False), one_end_token
        )

    @property
    def window(self):
        """The most tokens that the text tower reads."""
        return self.model.config.text_config.max_position_embeddings

    def tokenize(self, texts):
        tokens = self.tokenizer(
            list(texts), padding=self.family.padding, max_length=self.window, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids

    def reads_whole(self, text):
        """Whether a string fits into the text tower's window; what does not fit is cut off."""
        return len(self.tokenizer(text, verbose=False).input_ids) <= self.window

    def _image(self, pixels):
        return self.family.image(self.model, pixels)

    def _text(self, tokens):
        return self.family.text(self.model, tokens.to(self.device))

    @property
    def logit_scale(self):
        """Scale of the cosine in training; for BLIP, whose trained scale is not published, its initial value."""
        learned = getattr(self.model, "logit_scale", None)
        return math.exp(self.model.config.logit_scale_init_value) if learned is None else learned.exp().item()

    @property
    def logit_bias(self):
        """Bias added to the scaled cosine of a sigmoid model; None for other models."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.item()


def _name_or_folder(config):
    """Name of the weights on the hub, or their folder; None for random weights. Raises UserError for other settings."""
    if config.pretrained is None and config.architecture is None:
        raise UserError(f"random weights of {config.model} need its configuration: --set encoder.architecture=FILE.")
    if config.pretrained is None:
        return None
    if config.pretrained == "hub":
        return config.model
    if config.weights_file and config.weights_file.is_dir():
        return str(config.weights_file)
    raise UserError(f"encoder.pretrained is `hub`, null or a folder; there is no folder '{config.pretrained}'.")


def _configuration(config, name):
    if name is not None:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    return transformers.AutoConfig.for_model(**json.loads((HOME / config.architecture).read_text(encoding="utf-8")))


def _load(cls, config, name):
    """Load weights; raises UserError if some are missing, as in another model of the family: they would be random."""
    model, info = cls.from_pretrained(name, output_loading_info=True)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise UserError(f"the weights of {config.model} are not those of a {cls.__name__}: {missing} is missing.")
    return model


def _processor(name, config, size):
    """Preprocessing settings of the image processor that comes with the weights; empty if there is none."""
    if name is None:
        return {}
    try:
        processor = quietly(lambda: transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False))
    except (OSError, ValueError):
        return {}
    shortest = processor.size.get("shortest_edge")
    if (shortest or processor.size.get("height")) != size:
        raise UserError(
            f"the image processor of {config.model} resizes to {dict(processor.size)}, but its model takes {size}."
        )
    return {
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
        "interpolation": "bilinear" if processor.resample == BILINEAR else "bicubic",
        "resize_mode": "shortest" if shortest else "squash",
    }
