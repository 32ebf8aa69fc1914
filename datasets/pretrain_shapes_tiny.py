"""Train the built-in backbone `shapes-tiny` from scratch: `python -m datasets.pretrain_shapes_tiny`.

Ordinary CLIP training on the train split of `shapes`: 8,000 image files, shifted by a few pixels at each use, and new
captions for each batch. Prints the loss and text->image R@1 on val with full descriptions.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from tqdm import tqdm

from datasets.shapes import caption, describe
from models.backbones.openclip import Backbone
from models.pair_loss import info_nce
from utils.arguments import make_parser
from utils.config import load_config, make_source
from utils.device import pick_device
from utils.files import write_bytes
from utils.seed import seed_everything

CAPTIONS = 2  # per image in a batch, one InfoNCE each: the text tower is the cheaper one
SHIFT = 2  # pixels, of 64: less than the jitter of positions in the drawings


def pixels(images, backbone):
    """Load and preprocess image files for the backbone, (N, 3, H, W)."""
    loaded = [backbone.transform(Image.open(image.path)) for image in tqdm(images, desc="load", disable=None)]
    return backbone.normalize(torch.stack(loaded)).cpu()


def shifted(batch):
    """Shift each image of (B, 3, H, W) by up to SHIFT pixels; the border repeats the nearest pixel."""
    padded = F.pad(batch, [SHIFT] * 4, mode="replicate")
    dx, dy = torch.randint(0, 2 * SHIFT + 1, (2, len(batch), 1, 1))
    rows = dy + torch.arange(batch.shape[2])[None, :, None]
    columns = dx + torch.arange(batch.shape[3])[None, None, :]
    return padded[torch.arange(len(batch))[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


@torch.no_grad()
def full_description_recall(model, tokenizer, images, scenes, device):
    """Text->image R@1 of the full descriptions of N scenes on a gallery of their images (N, 3, H, W)."""
    image = torch.cat([model.encode_image(x.to(device), normalize=True) for x in images.split(256)])
    text = [describe(scene) for scene in scenes]
    text = torch.cat([model.encode_text(tokenizer(text[i : i + 256]).to(device), normalize=True)
                      for i in range(0, len(text), 256)])  # fmt: skip
    return (text @ image.T).argmax(1).cpu().eq(torch.arange(len(scenes))).float().mean().item()


def save_half(model, path):
    """Write the weights as float16 safetensors; integers stay integers."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    write_bytes(path, save({name: value.cpu().contiguous() for name, value in state.items()}))


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="configs/backbones/shapes-tiny.safetensors")
    args = parser.parse_args(argv)

    seed_everything(0)
    device = pick_device(args.device)
    config = load_config("shapes", backbone="shapes-tiny")
    config.encoder.pretrained = None  # from scratch
    backbone, source = Backbone(config.encoder, device), make_source(config)
    model = backbone.model.train().requires_grad_(True)
    train, scenes = pixels(source.images("train"), backbone), source.scenes("train")
    val, val_scenes = pixels(source.images("val"), backbone), source.scenes("val")

    # No decay on gains, biases and embeddings: words that no caption uses keep their small initial vectors.
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    warmup = min(200, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, step / args.steps))),
    )
    rng = np.random.default_rng(0)
    bar = tqdm(range(args.steps), desc="train shapes-tiny", disable=None)
    for step in bar:
        rows = rng.integers(len(train), size=args.batch_size)
        texts = backbone.tokenizer([caption(scenes[row], rng)[0] for _ in range(CAPTIONS) for row in rows])
        length = int(texts.argmax(1).max()) + 1
        image = F.normalize(model.encode_image(shifted(train[rows]).to(device)), dim=-1)
        with backbone.cut_to(length):
            text = F.normalize(model.encode_text(texts[:, :length].to(device)), dim=-1)
        scale = model.logit_scale.exp()
        loss = sum(info_nce(scale * image @ captions.T) for captions in text.split(len(rows))) / CAPTIONS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            recall = full_description_recall(model.eval(), backbone.tokenizer, val, val_scenes, device)
            bar.write(f"step {step + 1}: loss {loss.item():.3f}, R@1 of full descriptions on val {recall:.3f}")
            model.train()
    save_half(model, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
