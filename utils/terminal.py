"""One result of eval.py as text for the terminal."""

SIDES = {"text_to_image": "text->image", "image_to_text": "image->text", "image_to_class": "image->class"}
QUERY = {"text_to_image": "caption", "image_to_text": "image", "image_to_class": "image"}
ANSWER = {"text_to_image": "image", "image_to_text": "caption", "image_to_class": "class"}
SCORES = {"similarity": "cosine", "log_likelihood": "likelihood"}
GALLERY_AWARE = {"top": "top score", "margin": "margin", "entropy": "entropy", "probability": "top probability"}

BELIEFS = {  # what is said of the probabilities of a calibration's entries
    "model": "model",
    "temperature": "temperature",
    "validation": "temperature of {split}",
    "matched": "matched temperature",
}


def followed(side, name):
    """Say whose uncertainty is meant: the query caption's, the retrieved image's, ... or the gallery's entropy."""
    query, answer = f"query {QUERY[side]}", f"retrieved {ANSWER[side]}"
    return {"query": query, "retrieved": answer, "sum": f"{query} + {answer}"}.get(name) or GALLERY_AWARE[name]


def result_text(result):
    """Lay out one result: what was answered rightly, and what each uncertainty tells of it."""
    size = f"{result['images']:,} images, {result['captions']:,} captions"
    if result["classes"]:
        size = f"{result['images']:,} images, {result['classes']:,} classes, {result['captions']:,} prompts"
    ranked = f", ranked by {SCORES[result['score']]}" if "score" in result else ""
    lines = [f"{result['variant']} on {result['evaluated_on']} ({size}){ranked}"]
    if result["seen_in_training"]:
        lines.append(f"  leakage: {result['seen_in_training']:,} of the images were trained on")
    for side, title in SIDES.items():
        if side in result:
            lines += _side(side, title, result[side], result["classes"])
            if result.get("val") and "validation" not in result[side]["calibration"]:
                lines.append(f"    no temperature of {result['val']}: too few of its images are mistaken to bound one")
            if "other_score" in result:
                other = result["other_score"]
                by, part = SCORES[other["score"]], other[side]
                said = (
                    f"{_recalls(side, part, result['classes'])}; entropy: {_measures(part['uncertainty']['entropy'])}"
                )
                lines.append(f"    by {by}  {said}")
    if "coco" in result:
        lines += _coco(result["coco"])
    if "hierarchy" in result:
        lines += _hierarchy(result["hierarchy"])
    return "\n".join(lines)


def _side(side, title, part, classes):
    limit = f"  (Bayes-optimal R@1 {100 * part['bayes_recall']:.1f})" if "bayes_recall" in part else ""
    lines = [f"  {title}  {_recalls(side, part, classes)}{limit}"]
    chosen = part["uncertainty"].get(part["levels_by"], {})
    if "levels" in chosen:
        levels = chosen["levels"]
        name = "top-1" if classes else "R@1"
        lines.append(f"    {name} by uncertainty of the {followed(side, part['levels_by'])}, least uncertain first:")
        lines.append("    " + " ".join(f"{100 * value:5.1f}" for value in levels["recall"]["1"]))
        if "bayes_recall" in levels:
            lines.append(
                "    " + " ".join(f"{100 * value:5.1f}" for value in levels["bayes_recall"]) + "  Bayes-optimal"
            )
        said = [f"{name} {_number(chosen[key])}{_interval(chosen, key)}" for key, name in TREND.items()]
        lines.append("    " + "   ".join(said))
    if chosen.get("constant"):
        lines.append("    all queries are equally uncertain: there are no levels")
    names = [name for name in part["uncertainty"] if name not in GALLERY_AWARE] + ["entropy"]
    width = max(len(followed(side, name)) for name in names)
    for name in names:
        record = part["uncertainty"][name]
        lines.append(f"    {followed(side, name):{width}}  ({record['family']}): {_measures(record)}")
    return [*lines, *_calibration(part["calibration"])]


def _calibration(found):
    """A line where there is the usual temperature, and one for each entry where there are others."""
    errors = {name: _number(belief["ece_15"]) for name, belief in found.items()}
    if found.keys() <= {"model", "temperature"}:
        said = f"    calibration error (ECE) {errors['model']}, after temperature scaling"
        return [f"{said} {errors['temperature']}"] if "temperature" in found else []
    titles = {name: title.format(**found[name]) for name, title in BELIEFS.items() if name in found}
    width = max(map(len, (head := "calibration of the", *titles.values())))
    head = f"    {head:{width}}  NLPD   ECE"
    return [
        head,
        *(f"    {title:{width}} {_number(found[name]['nll'])} {errors[name]}" for name, title in titles.items()),
    ]


TREND = {"s": "S", "r2": "R2", "minus_s_r2": "-S*R2"}


def _measures(record):
    said = f"AUROC {_number(record['auroc'])}{_interval(record, 'auroc')}"
    said += f", of the surest 80 % {100 * record['selective_recall']['80']:.1f} % right"
    return said + (f", Spearman with the truth {record['spearman']:.3f}" if "spearman" in record else "")


def _recalls(side, part, classes):
    name = "top-" if side == "image_to_class" else "R@"
    told = {k: value for k, value in part["recall"].items() if not classes or int(k) < classes}
    return "  ".join(f"{name}{k} {100 * value:5.1f}" for k, value in told.items())


def _number(value):
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"  # such as where all answers are right, or all wrong


def _interval(record, name):
    found = record.get("interval", {}).get(name)
    return f" [{found[0]:.3f}, {found[1]:.3f}]" if found and record[name] is not None else ""


def _coco(found):
    lines = []
    for name, title in (
        ("coco_1k_r1", "COCO 1K R@1"),
        ("coco_5k_r1", "COCO 5K R@1"),
        ("cxc_r1", "CxC R@1"),
        ("eccv_r1", "ECCV R@1"),
        ("eccv_map_at_r", "ECCV mAP@R"),
        ("eccv_rprecision", "ECCV R-P"),
    ):
        if name in found:
            both = "  ".join(f"{SIDES[side]} {100 * value:5.1f}" for side, value in found[name].items())
            lines.append(f"  {title:11}  {both}")
    return lines


def _hierarchy(found):
    lines = [f"  {found['chains']:,} chains of prompts from general to specific; uncertainty by:"]
    names = {name: "the adaptor" if name == "query" else name for name in found["uncertainty"]}
    for name, record in found["uncertainty"].items():
        falls = (
            f"falls in {100 * record['falling_steps']:.1f} % of steps, all along {100 * record['falling_chains']:.1f} %"
        )
        lines.append(f"    {names[name]:27} {falls}; Spearman with depth {record['spearman_depth']:.3f}")
    return lines
