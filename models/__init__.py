"""Methods that give frozen embeddings an uncertainty, one file each, and the frozen backbones they build on."""

from utils.errors import UserError


def make_backbone(encoder, device="cpu"):
    """Construct the backbone of an Encoder's library; raises UserError for an unknown one, and what that one raises."""
    if encoder.pretrained == "elsewhere":
        what = f"the backbone '{encoder.model}' encodes nothing"
        raise UserError(f"{what}, it is for --dataset embeddings: name another with --backbone.")
    # Either library takes seconds to import.
    if encoder.library == "open_clip":
        from models.backbone import Backbone

        return Backbone(encoder, device)
    if encoder.library == "transformers":
        try:
            import transformers  # noqa: F401
        except ImportError:
            way = "pip install -r requirements-extra.txt"
            raise UserError(f"backbones of the library transformers need it: {way}.") from None
        from models.huggingface import HuggingFace

        return HuggingFace(encoder, device)
    raise UserError(f"encoder.library is open_clip or transformers, not '{encoder.library}'.")
