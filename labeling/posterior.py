"""The posterior of the image projection that BALD, EPIG and Wasserstein neighbors draw from."""

import hashlib
import math
from pathlib import Path

import torch

from datasets.embeddings import Pairs
from labeling.splits import must_share_backbone
from models.bayesvlm import BayesVLM
from models.laplace import Factors, Posterior, activation_factor, curvature
from utils.config import known, load_config
from utils.errors import UserError


def make_posterior(splits, classifier, loss, factors, n, quiet):
    """The posterior of the pretrained projection, and a fingerprint of the data it was made of, beyond the splits.

    factors: `pool` takes all images of the pool against the classes, without labels: the likelihood that is trained.
    The name of a data set of captions, an adaptor.pt of bayesvlm, or published factors describe instead what the
    backbone has seen before, so images unlike that stay uncertain however many the pool has. loss: as models/laplace.py
    names it. n: how often each item counts. Raises UserError for factors that do not exist or fit.
    """
    weight, source = classifier.pretrained, {}
    if factors == "pool":
        kronecker = _pool_factors(splits.pool, classifier, loss)
    else:
        kronecker, source = _other_factors(splits.of_target, factors, weight, quiet)
    try:
        return Posterior(kronecker, weight.cpu().double().square().sum().item(), n), source
    except ValueError as error:
        raise UserError(f"the factors of {factors}: {error}.") from None


def _pool_factors(pool, classifier, loss):
    b = curvature(pool.embedding, classifier.classes, classifier.scale, **loss) / math.sqrt(len(pool.phi))
    return Factors(activation_factor(pool.phi, device=pool.phi.device), b, len(pool.phi))


def _other_factors(pairs, factors, weight, quiet):
    """The image tower's factors from elsewhere, on the device of `weight`, and their fingerprint."""
    is_dataset = factors in known("datasets")
    if is_dataset:
        config = load_config(factors, backbone=pairs.meta["backbone"])
        captions = Pairs(factors, config.backbone, config.data.train_split, pooled=True)
        must_share_backbone(captions, pairs)
        if captions.classes is not None:
            raise UserError(f"--factors {factors} has classes: name a data set of captions, or pool.")
        pairs = captions
    elif not Path(factors).exists():
        raise UserError(f"--factors {factors} is neither pool, nor a data set, nor a file or folder of factors.")
    torch.manual_seed(0)
    adaptor = BayesVLM(pairs.dim, factors="" if is_dataset else factors).to(weight.device)
    image_factors = adaptor.find_factors(pairs, quiet)[0]["image"]
    content = b"".join(part.cpu().numpy().tobytes() for part in image_factors[:-1])
    source = {"factors": pairs.meta["fingerprint"] if is_dataset else hashlib.sha256(content).hexdigest()}
    return type(image_factors)(*(part.to(weight) for part in image_factors[:-1]), image_factors.count), source
