"""The frozen vision-language models: `make_backbone` constructs one, of open_clip or of transformers."""

from utils.errors import UserError, one_of

LIBRARIES = ("open_clip", "transformers")


def make_backbone(encoder, device="cpu"):
    """Construct the backbone that an Encoder describes; raises UserError for an unknown library, and what it raises."""
    if encoder.pretrained == "elsewhere":
        raise UserError(
            f"the backbone '{encoder.model}' cannot encode anything: it stands for embeddings computed elsewhere"
            " (--dataset embeddings). Name another with --backbone."
        )
    # Either library takes seconds to import.
    if one_of("encoder.library", encoder.library, LIBRARIES, UserError) == "open_clip":
        from models.backbones.openclip import Backbone

        return Backbone(encoder, device)
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(
            "backbones of the library transformers need it: pip install -r requirements-extra.txt."
        ) from None
    from models.backbones.huggingface import HuggingFace

    return HuggingFace(encoder, device)
