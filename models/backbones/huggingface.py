"""The frozen vision-language model from Hugging Face transformers: CLIP, SigLIP and BLIP's retrieval model."""

import json
import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
import transformers

from models.backbones.openclip import Frozen, quietly, said
from utils.config import HOME
from utils.errors import UserError

transformers.logging.disable_progress_bar()  # of reading files that lie here
BILINEAR = 2  # Pillow's number, as processors store it


class Family(NamedTuple):
    model: str  # class in transformers
    image: Callable  # model, pixels -> (N, D)
    text: Callable  # model, tokens -> (M, D)
    dim: Callable  # config -> D
    preprocess: dict  # where the weights come without a processor: what differs from OpenAI's
    padding: str = "longest"  # what follows a text is never seen: causal, or masked


def _blip_text(model, tokens):
    mask = tokens != model.config.text_config.pad_token_id
    return model.text_proj(model.text_encoder(tokens, attention_mask=mask.long())[0][:, 0])


# Put together from the towers: `get_image_features` gives another type in each major version.
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
        "max_length",  # trained so, without a mask
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

    config: an Encoder. Raises UserError for another family, and for weights or a configuration that cannot be had.
    """

    def __init__(self, config, device="cpu"):
        self.place = _place(config)
        try:
            settings = quietly(lambda: _configuration(config, self.place))
            self.family = FAMILIES.get(settings.model_type)
            if self.family is None:
                raise UserError(f"{config.model} is a '{settings.model_type}', but known are {', '.join(FAMILIES)}.")
            kind = getattr(transformers, self.family.model)
            torch.manual_seed(0)  # random weights, where asked for, are the same everywhere
            model = kind(settings) if self.place is None else quietly(lambda: _load(kind, config, self.place))
        except UserError:
            raise
        except Exception as error:  # transformers raises whatever the hub's client or a file's parser raised
            raise UserError(
                f"{config.model} does not load ({said(error)}): check the connection, or name a folder that holds it"
                " with --set encoder.pretrained=FOLDER."
            ) from None
        size = settings.vision_config.image_size
        preprocess = self.family.preprocess | _processor(self.place, config, size) | {"size": size}
        super().__init__(config, device, model.float(), preprocess, self.family.dim(settings))

    @cached_property
    def tokenizer(self):
        """The tokenizer, loaded at first use; raises UserError where it cannot be had."""
        name = self.config.tokenizer or self.place
        if name is None:
            raise UserError(
                f"{self.config.model} with random weights has no tokenizer: name one, --set encoder.tokenizer=FOLDER."
            )
        ends = self.family.padding == "max_length"
        return self._load_tokenizer(name, lambda: transformers.AutoTokenizer.from_pretrained(name), ends)

    @property
    def window(self):
        """How many tokens the text tower reads."""
        return self.model.config.text_config.max_position_embeddings

    def tokenize(self, texts):
        tokens = self.tokenizer(
            list(texts), padding=self.family.padding, max_length=self.window, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids

    def reads_whole(self, text):
        """Whether a string fits into the text tower's window; the rest is cut."""
        return len(self.tokenizer(text, verbose=False).input_ids) <= self.window

    def _image(self, pixels):
        return self.family.image(self.model, pixels)

    def _text(self, tokens):
        return self.family.text(self.model, tokens.to(self.device))

    @property
    def logit_scale(self):
        """Factor on the cosine that the model was trained with; BLIP's is not published, so that it is its start."""
        learned = getattr(self.model, "logit_scale", None)
        return math.exp(self.model.config.logit_scale_init_value) if learned is None else learned.exp().item()

    @property
    def logit_bias(self):
        """Number added to the scaled cosine, or None: sigmoid models have one."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.item()


def _place(config):
    """Where the weights are: a folder, a name on the hub, or None: random; raises UserError for anything else."""
    if config.pretrained is None and config.architecture is None:
        raise UserError(f"random weights of {config.model} need its configuration: --set encoder.architecture=FILE.")
    if config.pretrained in (None, "hub"):
        return config.pretrained and config.model
    if config.weights_file and config.weights_file.is_dir():
        return str(config.weights_file)
    raise UserError(f"encoder.pretrained is `hub`, null or a folder; there is no folder '{config.pretrained}'.")


def _configuration(config, place):
    if place is not None:
        return transformers.AutoConfig.from_pretrained(place)
    return transformers.AutoConfig.for_model(**json.loads((HOME / config.architecture).read_text(encoding="utf-8")))


def _load(kind, config, place):
    """Load weights; raises UserError where they are of another model of the family, which would leave some random."""
    model, found = kind.from_pretrained(place, output_loading_info=True)
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])[0]
        raise UserError(f"the weights of {config.model} are not those of a {kind.__name__}: {missing} is missing.")
    return model


def _processor(place, config, size):
    """What the weights' own image processor says of the pixels' way to the model; nothing where they have none."""
    if place is None:
        return {}
    try:
        own = quietly(lambda: transformers.AutoImageProcessor.from_pretrained(place))
    except (OSError, ValueError):
        return {}
    shortest = own.size.get("shortest_edge")
    if (shortest or own.size.get("height")) != size:
        raise UserError(
            f"the image processor of {config.model} resizes to {dict(own.size)}, but its model takes {size}."
        )
    return {
        "mean": tuple(own.image_mean),
        "std": tuple(own.image_std),
        "interpolation": "bilinear" if own.resample == BILINEAR else "bicubic",
        "resize_mode": "shortest" if shortest else "squash",
    }
