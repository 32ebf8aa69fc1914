"""The contract: what every method of configs/methods keeps, with every preset.

    python -m tests.check_method asymvlm-psd --preset reference

prints a line per check: `ok`, `FAILED` with what the check wants and what it saw, or `does not apply` with the reason.
Without --preset it checks every preset, without a name every method. The exit code is 1 if a check failed.

A section of the method's YAML, or of a preset in it, tells the contract what it cannot see:

    contract:
      wider: {head: raised} # what makes every distribution wider: a module, parameter, buffer or number, and its change
      huge: its exp overflows # a check that does not apply, and why; it runs nevertheless, and must fail
"""

import atexit
import contextlib
import functools
import inspect
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import cache_embeddings
import eval as evaluation
import train
from datasets.bank import draw
from datasets.embeddings import Pairs
from models.base import Adaptor, Embedding
from models.pair_loss import cross_entropies, mean_of
from utils.arguments import make_parser
from utils.config import MEANS, contract_of, known, load_config, make_adaptor, presets_of
from utils.device import pick_device
from utils.errors import UserError, exits_cleanly, one_of

N, M, DIM = 9, 13, 24  # images, captions and size of the drawn embeddings
SCORES = ("similarity", "log_likelihood", "classify")
LOSSES = ("loss", "unified_loss")  # of --objective native and infonce
TEMPERATURES = ("log_temperature", "free_temperature")  # parameters of Adaptor, which `loss` need not use
CHANGES = {"raised": lambda x: x + 1, "lowered": lambda x: x - 1, "doubled": lambda x: x * 2, "halved": lambda x: x / 2}
# Images of a small `shapes`, and the settings that cache it.
SMALL = {"train_images": 300, "val_images": 100}
SMALL_WORLD = [f"data.options.{name}={count}" for name, count in SMALL.items()]
SPEARMAN = 0.8  # least correlation of uncertainty and true ambiguity where a YAML says `ordered: true`


class DoesNotApply(Exception):
    """A check has nothing to check, for the reason given."""


# The checks. The docstring says what a check wants; a failure prints it before what the check saw.


def constructs(case):
    """The YAML constructs a models.base.Adaptor, which can be prepared with cached pairs."""
    adaptor = case.build()
    require(isinstance(adaptor, Adaptor), f"a {type(adaptor).__name__}")


def shapes(case):
    """Means are (N, D), uncertainties (N,), spreads have N rows, scores are (N, M), losses ().

    `compared_answers` is above 0 where `of_candidates` is overridden, and only there.
    """
    adaptor = case.build()
    image, text = inputs(adaptor)
    adapted = {"images": adaptor.adapt_image(image), "captions": adaptor.adapt_text(text)}
    for (side, embedding), count in zip(adapted.items(), (N, M), strict=True):
        require(isinstance(embedding, Embedding), f"a {type(embedding).__name__} instead of an Embedding of {side}")
        require_shape(f"mean of {side}", embedding.mean, (count, DIM))
        if embedding.uncertainty is not None:
            require_shape(f"uncertainty of {side}", embedding.uncertainty, (count,))
        if embedding.spread is not None:
            require_shape(f"spread of {side}", embedding.spread, (count, *embedding.spread.shape[1:]))
    for name in SCORES:
        require_shape(name, getattr(adaptor, name)(*adapted.values()), (N, M))
    for name in LOSSES:
        require_shape(name, getattr(adaptor, name)(image, text[:N]), ())
    compares = type(adaptor).of_candidates is not Adaptor.of_candidates
    wanted = f"{'' if compares else 'no '}`of_candidates`"
    require((adaptor.compared_answers > 0) == compares, f"compared_answers {adaptor.compared_answers} and {wanted}")


def finite(case):
    """Embeddings, scores, losses and their gradients are finite."""
    finite_with(case, 1)


def zero(case):
    """All stay finite with an image and a caption whose embedding is zero."""
    finite_with(case, 0)


def tiny(case):
    """All stay finite with an image and a caption whose embedding is 10,000 times as short as the others."""
    finite_with(case, 1e-4)


def huge(case):
    """All stay finite with an image and a caption whose embedding is 10,000 times as long as the others."""
    finite_with(case, 1e4)


def independent(case):
    """An item's embedding and a pair's score do not depend on the other items."""
    adaptor = case.build().double()
    image, text = (x.double() for x in inputs(adaptor))
    images, captions = slice(2, 5), slice(4, 7)
    part = outputs(adaptor, image[images], text[captions])
    wanted = {}
    for name, value in outputs(adaptor, image, text).items():
        if name.endswith("of images"):
            wanted[name] = value[images]
        elif name.endswith("of captions"):
            wanted[name] = value[captions]
        elif name != "classify":  # which may normalize over classes
            wanted[name] = value[images, captions]
    require_equal(part, wanted, tolerance=1e-12)


def unified(case):
    """`unified_loss` is symmetric InfoNCE over temperature times `log_likelihood`, plus `auxiliary_loss`."""
    adaptor = case.build().double()
    image, text = (x.double()[:N] for x in inputs(adaptor))
    pair = adaptor.adapt_image(image), adaptor.adapt_text(text)
    losses = cross_entropies(adaptor.temperature * adaptor.log_likelihood(*pair))
    wanted = mean_of(losses) + adaptor.auxiliary_loss(*pair, losses)
    require_equal({"unified_loss": adaptor.unified_loss(image, text)}, {"unified_loss": wanted}, tolerance=1e-8)


def state(case):
    """A new adaptor that loads the state_dict computes exactly the same: all it needs is a parameter or a buffer."""
    adaptor, other = case.build(), case.construct(seed=1)
    image, text = inputs(adaptor)
    adaptor.train().loss(image, text[:N])  # running statistics, for example, are part of the state
    file = io.BytesIO()
    torch.save(adaptor.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    require_equal(outputs(other, image, text), outputs(adaptor.eval(), image, text))


def float64(case):
    """In float64 all results are float64 and, up to rounding, those of float32."""
    adaptor = case.build()
    image, text = inputs(adaptor)
    wanted = outputs(adaptor, image, text)
    results = outputs(adaptor.double(), image.double(), text.double())
    for name, value in results.items():
        require(value.dtype == torch.float64, f"{name} is {value.dtype}")
    require_equal(results, wanted, tolerance=1e-3)


def device(case):
    """On an accelerator all results lie there and are, up to rounding, those of the CPU."""
    accelerator = pick_device()
    if accelerator.type == "cpu":
        raise DoesNotApply("this machine has no accelerator")
    adaptor = case.construct().to(accelerator)
    prepare(adaptor)
    image, text = inputs(adaptor)
    results = outputs(adaptor, image.to(accelerator), text.to(accelerator))
    for name, value in results.items():
        require(value.device.type == accelerator.type, f"{name} lies on {value.device}")
    require_equal(results, outputs(case.build(), image, text), tolerance=1e-3)


def gradients(case):
    """`loss` gives every parameter a gradient, and `unified_loss` the temperature."""
    adaptor = case.build().train()
    require_parameters(adaptor)
    image, text = inputs(adaptor)
    parameters = {name: p for name, p in adaptor.named_parameters() if p.requires_grad}
    temperatures = [name for name in parameters if name in TEMPERATURES]
    others = [name for name in parameters if name not in TEMPERATURES]
    for loss_name, names in zip(LOSSES, (others, temperatures), strict=True):
        adaptor.zero_grad()
        loss = getattr(adaptor, loss_name)(image, text[:N])
        if loss.requires_grad:
            loss.backward()
        missing = [name for name in names if parameters[name].grad is None]
        require(not missing, f"{loss_name} gives none to {listed(missing)}")


def learns(case):
    """A dozen steps lower either loss, and the same steps again give the same losses bit for bit."""
    for name in LOSSES:
        losses, again = (take_steps(case.build(), name) for _ in range(2))
        require(losses[-1] < losses[0], f"{name} goes from {losses[0]:.6g} to {losses[-1]:.6g}")
        require(losses == again, f"{name} ends at {losses[-1]!r}, and again at {again[-1]!r}")


def means(case):
    """With each --mean either loss falls; a frozen mean stays, a residual one starts at the embedding's direction.

    Images have such a mean too, or always keep the embedding's direction.
    """
    if "mean" not in inspect.signature(type(case.build())).parameters:
        raise DoesNotApply("it has no option 'mean'")
    learned = case.build("learned")
    moving = ["captions"] if starts_at_embeddings(learned)["images"] else ["images", "captions"]
    for mean in MEANS:
        for name in LOSSES:
            mean_trains(case, mean, name, moving)


def sign(case):
    """Every uncertainty rises when the change that the YAML calls `wider` is made."""
    adaptor = case.build()
    before = uncertainties(adaptor)
    if not before:
        raise DoesNotApply("it has no uncertainty")
    changes = case.contract.get("wider", {})
    if not changes:
        require(not depends_on_state(adaptor), "a learned uncertainty, and no `contract: {wider: ...}` in the YAML")
        raise DoesNotApply("no parameter and no buffer has a part in its uncertainty")
    for name, change in changes.items():
        change_part(adaptor, name, CHANGES[change])
    after = uncertainties(adaptor)
    for side, uncertainty in before.items():
        rises = (after[side] > uncertainty).sum().item()
        require(rises == len(uncertainty), f"it rises for {rises} of {len(uncertainty)} {side}")


def ordered(case):
    """Trained shortly on `shapes`, captions' uncertainty has a Spearman correlation of 0.8 with true ambiguity."""
    if case.preset != "default" or not case.config().ordered:
        raise DoesNotApply("its YAML does not say `ordered: true` of this preset")
    run = ["--dataset", "shapes", "--method", case.method, "--device", "cpu", "--quiet"]
    short = ["--val-fraction", "0", "--set", "train.epochs=20", "train.batch_size=256", "optim.lr=2e-3"]
    with tempfile.TemporaryDirectory() as folder, working_in(folder):
        for name in ("embeddings", "data"):
            Path(name).symlink_to(small_world() / name)
        call(train, *run, *short)
        call(evaluation, *run)
        [path] = Path("results").rglob("*.json")
        uncertainty = json.loads(path.read_text())["text_to_image"]["uncertainty"]
    require("query" in uncertainty, "captions without uncertainty")
    spearman = uncertainty["query"]["spearman"]
    require(spearman >= SPEARMAN, f"{spearman:.3f}{', an order upside down' if spearman < 0 else ''}")


# In this order: without the first three the others say nothing.
REQUIRED = (constructs, shapes, finite)
CHECKS = {
    check.__name__: check
    for check in (
        *REQUIRED, zero, tiny, huge, independent, unified, state, float64, device, gradients, learns,
        means, sign, ordered,
    )
}  # fmt: skip


def run_check(name, case):
    """Run one check; returns `ok`, `FAILED` or `does not apply`, and why."""
    check, excuse = CHECKS[name], case.contract.get(name)
    try:
        check(case)
    except DoesNotApply as reason:
        return "does not apply", excuse or str(reason)
    except Exception as error:  # whatever the method raises is what the check saw
        if excuse:
            return "does not apply", excuse
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return "FAILED", " ".join(f"{check.__doc__} Saw: {kind}{error}".split())
    if excuse:
        return "FAILED", f"The YAML says that it does not apply ({excuse}), but it passes."
    return "ok", ""


def run_contract(case):
    """Run all checks, or those up to a required one that fails; yields what `run_check` returns, after the name."""
    for name, check in CHECKS.items():
        verdict, why = run_check(name, case)
        yield name, verdict, why
        if verdict == "FAILED" and check in REQUIRED:
            break


# What the checks use.


class Case(NamedTuple):
    """A method with one of its presets."""

    method: str
    preset: str = "default"

    def config(self, mean=""):
        """Resolve the configuration that a run on `shapes` has."""
        return load_config("shapes", self.method, preset=self.preset, mean=mean)

    @property
    def contract(self):
        """The YAML's section `contract`; raises UserError for an unknown key or value in it."""
        contract, where = contract_of(*self), f"configs/methods/{self.method}.yaml: contract"
        for name, value in contract.items():
            if name == "wider":
                if not isinstance(value, dict):
                    raise UserError(f"{where}: wider must hold names and changes, not {value!r}.")
                for part, change in value.items():
                    one_of(f"{where}: wider: {part}", change, CHANGES, UserError)
            elif name not in CHECKS:
                raise UserError(f"{where} has no key '{name}'; it has wider, {', '.join(CHECKS)}.")
            elif not (isinstance(value, str) and value):
                raise UserError(f"{where}: {name} must be the reason why it does not apply, not {value!r}.")
        return contract

    def construct(self, seed=0, mean=""):
        """Construct the adaptor from its YAML, in evaluation mode."""
        torch.manual_seed(seed)
        return make_adaptor(self.config(mean), DIM).eval()

    def build(self, mean=""):
        """Construct the adaptor and prepare it with the drawn pairs."""
        adaptor = self.construct(mean=mean)
        prepare(adaptor)
        return adaptor


class Drawn(Pairs):
    """Random pairs in place of a cache, with pooled features: each image has one caption or more.

    widths: P of both towers, without the 1. bias: whether their maps have one. logit_bias: that of a sigmoid model.
    """

    def __init__(self, image, text, widths=(30, 20), bias=True, logit_bias=None, seed=0):
        rng = np.random.default_rng(seed)
        self.folder, self.command = Path("drawn"), "python cache_embeddings.py"
        self.image, self.text, dim = image, text, image.shape[1]
        self.image_id, self.image_of_text = np.arange(len(image)) + 1000, np.arange(len(text)) % len(image)
        self.arrays, self.projection = {}, {}
        for side, rows, width in zip(("image", "text"), (image, text), widths):
            self.arrays[f"{side}_pooled"] = rng.standard_normal((len(rows), width)).astype(rows.dtype)
            self.projection[f"{side}_weight"] = rng.standard_normal((dim, width))
            if bias:
                self.projection[f"{side}_bias"] = rng.standard_normal(dim)
        self.meta = {"dim": dim, "features": "pooled", "logit_scale": 20.0, "logit_bias": logit_bias}
        self.meta |= {"id_space": "drawn", "encoder_fingerprint": "drawn"}

    def _array(self, name, *_):
        return self.arrays[name]


def drawn_pairs():
    """Draw N images and M captions, the first N of which match the images in order."""
    generator = torch.Generator().manual_seed(0)
    return Drawn(*(3 * torch.randn(count, DIM, generator=generator).numpy() for count in (N, M)))


def prepare(adaptor):
    """Prepare the adaptor with the drawn pairs."""
    pairs = drawn_pairs()
    adaptor.prepare(pairs, draw(pairs, range(M), seed=0, pooled=adaptor.pooled), quiet=True)


def inputs(adaptor):
    """Return what the adaptor is fed of the drawn images and captions: (N, DIM), (M, DIM), pooled features beside."""
    pairs = drawn_pairs()
    return [torch.from_numpy(pairs.fed(side, adaptor.pooled)[:]) for side in ("image", "text")]


def outputs(adaptor, image, text):
    """Compute all that an evaluation uses, by name: fields of both embeddings, and scores."""
    adapted = {"images": adaptor.adapt_image(image), "captions": adaptor.adapt_text(text)}
    results = {
        f"{field} of {side}": value.detach()
        for side, embedding in adapted.items()
        for field, value in embedding._asdict().items()
        if value is not None
    }
    return results | {name: getattr(adaptor, name)(*adapted.values()).detach() for name in SCORES}


def uncertainties(adaptor):
    """Compute the uncertainties of the drawn images and captions, by name; only of those that have one."""
    image, text = inputs(adaptor)
    adapted = {"images": adaptor.adapt_image(image), "captions": adaptor.adapt_text(text)}
    return {side: e.uncertainty.detach() for side, e in adapted.items() if e.uncertainty is not None}


def require(condition, saw):
    """Fail the check, with what it saw, unless the condition holds."""
    if not condition:
        raise AssertionError(saw)


def require_equal(results, wanted, tolerance=0.0):
    """Require that outputs differ by at most `tolerance`, which is relative for values above 1."""
    for name, want in wanted.items():
        result, want = results[name].cpu().double(), want.cpu().double()
        equal = (result - want).abs() <= tolerance * want.abs().clamp_min(1)
        require(equal.all(), f"{name} differs in {(~equal).sum()} of {equal.numel()} values")


def require_finite(values):
    """Require that the named tensors are finite."""
    names = [name for name, value in values.items() if not torch.isfinite(value).all()]
    require(not names, f"{listed(names)} not finite")


def listed(names, most=3):
    """Join names, the first few of many."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def take_steps(adaptor, loss_name):
    """Train on the drawn pairs for a dozen steps; returns the loss at each. Raises DoesNotApply without parameters."""
    require_parameters(adaptor)
    optimizer = torch.optim.Adam(adaptor.train().parameters(), lr=1e-3, fused=True)
    image, text = inputs(adaptor)
    losses = []
    for _ in range(12):
        loss = getattr(adaptor, loss_name)(image, text[:N])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    adaptor.eval()
    return losses


def require_parameters(adaptor):
    if not any(p.requires_grad for p in adaptor.parameters()):
        raise DoesNotApply("it has no parameters to train")


def require_shape(name, value, shape):
    require(value.shape == shape, f"{name} {tuple(value.shape)} instead of {shape}")


def finite_with(case, factor):
    """Require finite results with the first image and the first caption multiplied by `factor`."""
    adaptor = case.build()
    image, text = inputs(adaptor)
    for rows in (image, text):
        rows[0, : -1 if adaptor.pooled else None] *= factor  # the 1 that ends a pooled row multiplies a bias and stays
    require_finite(outputs(adaptor, image, text))
    for name in LOSSES:
        loss = getattr(adaptor, name)(image, text[:N])
        require_finite({name: loss})
        adaptor.zero_grad()
        if loss.requires_grad:
            loss.backward()
        gradients = {f"gradient of {name} by {part}": p.grad for part, p in adaptor.named_parameters()}
        require_finite({name: gradient for name, gradient in gradients.items() if gradient is not None})


def directions(adaptor):
    """Compute the directions of the means of the drawn images and captions, by name."""
    image, text = inputs(adaptor)
    adapted = {"images": adaptor.adapt_image(image), "captions": adaptor.adapt_text(text)}
    return {side: F.normalize(embedding.mean.detach(), dim=-1) for side, embedding in adapted.items()}


def starts_at_embeddings(adaptor):
    """Whether means have the directions of the embeddings, by name."""
    frozen = [F.normalize(rows[:, :DIM], dim=-1) for rows in inputs(adaptor)]
    sides = zip(directions(adaptor).items(), frozen, strict=True)
    return {side: torch.allclose(direction, embedding, atol=1e-5) for (side, direction), embedding in sides}


def mean_trains(case, mean, loss_name, moving):
    """Require that one kind of mean starts where it must, and that one of the losses trains it.

    moving: the sides, of images and captions, that have such a mean; the mean of the others is frozen.
    """
    adaptor = case.build(mean)
    first, kept = directions(adaptor), starts_at_embeddings(adaptor)
    losses = take_steps(adaptor, loss_name)
    last, trained = directions(adaptor), f"with --mean {mean} and {loss_name}"
    require(losses[-1] < losses[0], f"{trained} the loss goes from {losses[0]:.6g} to {losses[-1]:.6g}")
    for side in first:
        kind = mean if side in moving else "frozen"
        stays, start = torch.allclose(last[side], first[side], atol=1e-5), "at" if kept[side] else "away from"
        require(kept[side] == (kind != "learned"), f"{trained} means of {side} start {start} the embeddings")
        require(stays == (kind == "frozen"), f"{trained} means of {side} {'stay' if stays else 'move'}")


def depends_on_state(adaptor):
    """Whether other parameters and buffers change the uncertainties; adds 0.1 to all that are no whole numbers."""
    before = uncertainties(adaptor)
    for value in adaptor.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1)
    after = uncertainties(adaptor)
    return any((after[side] != before[side]).any() for side in before)


def change_part(adaptor, name, change):
    """Change what lies at a dotted name of an adaptor: the output of a module, a tensor, or a number."""
    owner, _, attribute = name.rpartition(".")
    owner = adaptor.get_submodule(owner)
    part = getattr(owner, attribute)
    if isinstance(part, torch.nn.Module):
        part.register_forward_hook(lambda module, arguments, output: change(output))
    elif isinstance(part, torch.Tensor):
        part.data = change(part.data)
    else:
        setattr(owner, attribute, change(part))


@functools.cache
def small_world():
    """Cache a small `shapes` with the built-in backbone; returns its folder, which the end of the process removes."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    flags = ["--dataset", "shapes", "--features", "pooled", "--device", "cpu", "--quiet"]
    with working_in(folder):
        call(cache_embeddings, *flags, "--set", *SMALL_WORLD)
    return folder


@contextlib.contextmanager
def working_in(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def call(script, *arguments):
    """Call a script's main without its output; raises AssertionError with the sentence that it ends on."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            script.main(list(arguments))
    except SystemExit:
        raise AssertionError(output.getvalue().strip()) from None


@exits_cleanly()
def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("method", nargs="?", help="a file of configs/methods; by default every one")
    parser.add_argument("--preset", help="by default every preset")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    methods = [args.method] if args.method else known("methods")
    cases = [Case(method, preset) for method in methods for preset in presets_of(method)]
    if args.preset:
        one_of("--preset", args.preset, list(dict.fromkeys(case.preset for case in cases)), UserError)
    width = max(len(" ".join(case)) for case in cases)
    failed = False
    for case in cases:
        if args.preset in (None, case.preset):
            for name, verdict, why in run_contract(case):
                result = f"{verdict}: {why}" if why else verdict
                print(f"{' '.join(case):<{width}}  {name:<11}  {result}", flush=True)
                failed |= verdict == "FAILED"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
