"""The names of directions, scores, uncertainties and figures, as tables, figures and the terminal print them."""

LEVEL = 0.05  # of significance
REAL = "†"  # marks a difference whose interval leaves 0 out
SIGNIFICANT = "‡"  # marks one that also survives the adjustment for all comparisons
NONE = "\N{EN DASH}"  # printed where there is no such number
MINUS = "\N{MINUS SIGN}"
RETRIEVAL = {"text_to_image": "text→image", "image_to_text": "image→text"}
CLASSIFICATION = {"image_to_class": "image→class"}
DIRECTIONS = RETRIEVAL | CLASSIFICATION
QUERY = {"text_to_image": "caption", "image_to_text": "image", "image_to_class": "image"}
ANSWER = {"text_to_image": "image", "image_to_text": "caption", "image_to_class": "class"}
SCORES = {"similarity": "cosine", "log_likelihood": "likelihood"}
GALLERY_AWARE = {"top": "top score", "margin": "margin", "entropy": "entropy", "probability": "top probability"}
OF_CANDIDATES = {"conditional": "conditional entropy", "information": "low mutual information"}  # by the best answers
OWN = ("query", "retrieved", "sum", *OF_CANDIDATES)  # uncertainties of a method itself, or made of them
FREE = {"words": "few words", "length": "long embedding"}  # known before the search, without a model
PROBABILITIES = {  # entries of a result's calibration
    "model": "model",
    "temperature": "temperature",
    "validation": "temperature of {split}",
    "matched": "matched temperature",
}
TREND = {"s": "S", "r2": "R²", "minus_s_r2": f"{MINUS}S·R²"}  # of R@1 over levels of uncertainty
COCO = {  # figures of metrics/eccv.py; papers average both directions
    "eccv_map_at_r": "ECCV mAP@R",
    "eccv_rprecision": "ECCV R-P",
    "eccv_r1": "ECCV R@1",
    "cxc_r1": "CxC R@1",
    "coco_5k_r1": "5K R@1",
    "coco_5k_rsum": "5K RSUM",
    "coco_1k_r1": "1K R@1",
    "coco_1k_rsum": "1K RSUM",
}


def followed(direction, name):
    """Name an uncertainty in words: of the query caption, of the retrieved image, the entropy over the gallery, ..."""
    query, answer = f"query {QUERY[direction]}", f"retrieved {ANSWER[direction]}"
    return {"query": query, "retrieved": answer, "sum": f"{query} + {answer}"}.get(name) or (
        GALLERY_AWARE | OF_CANDIDATES | FREE
    )[name]


def over(counts, unit):
    """Say what rows of so many seeds or trials are: "one seed", "mean ± s.d. over 3 seeds", "... over 1 to 3 seeds"."""
    least, most = min(counts), max(counts)
    if most == 1:
        return f"one {unit}"
    return f"mean ± s.d. over {most if least == most else f'{least} to {most}'} {unit}s"


def plain(text):
    """Replace typographic signs by what every terminal shows."""
    for sign, letters in ((MINUS, "-"), ("→", "->"), ("²", "2"), ("·", "*")):
        text = text.replace(sign, letters)
    return text
