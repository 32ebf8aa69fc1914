"""One result of eval.py as text for the terminal."""

from reporting.words import COCO, DIRECTIONS, GALLERY_AWARE, PROBABILITIES, SCORES, TREND, followed, plain


def result_text(result):
    """Lay out one result: recall, uncertainty and calibration of either direction, and what else it holds."""
    size = f"{result['images']:,} images, {result['captions']:,} captions"
    if result["classes"]:
        size = f"{result['images']:,} images, {result['classes']:,} classes, {result['captions']:,} prompts"
    ranked = f", ranked by {SCORES[result['score']]}" if "score" in result else ""
    lines = [f"{result['variant']} on {result['evaluated_on']} ({size}){ranked}"]
    if result["seen_in_training"]:
        lines.append(f"  leakage: {result['seen_in_training']:,} of the images were trained on")
    if result.get("untrained"):
        lines.append("  untrained: held-out pairs chose the start, so the method's own uncertainty means nothing")
    if result.get("repeated_captions"):
        count = f"{result['repeated_captions']:,}"
        lines.append(f"  {count} captions also stand with another image: no search can tell which of these is meant")
    for direction in DIRECTIONS:
        if direction in result:
            lines += _direction(direction, result)
    if "coco" in result:
        lines += _coco(result["coco"])
    if "hierarchy" in result:
        lines += _hierarchy(result["hierarchy"])
    return plain("\n".join(lines))


def _direction(direction, result):
    part, classes = result[direction], result["classes"]
    interval = part.get("interval", {}).get("recall", {}).get("1")
    error = f"  (R@1 [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}] over images)" if interval else ""
    limit = f"  (Bayes-optimal R@1 {100 * part['bayes_recall']:.1f})" if "bayes_recall" in part else ""
    lines = [f"  {DIRECTIONS[direction]}  {_recalls(direction, part, classes)}{error}{limit}"]
    if "uncorrected" in result:
        name = "top-1" if classes else "R@1"
        lines.append(_hubs(result["hubs"], direction, result["uncorrected"][direction], name))
    record = part["uncertainty"].get(part["levels_by"], {})
    if "levels" in record:
        name = "top-1" if classes else "R@1"
        levels, by = record["levels"], followed(direction, part["levels_by"])
        lines += [
            f"    {name} by uncertainty of the {by}, least uncertain first:",
            "    " + " ".join(f"{100 * value:5.1f}" for value in levels["recall"]["1"]),
        ]
        if "bayes_recall" in levels:
            limits = " ".join(f"{100 * value:5.1f}" for value in levels["bayes_recall"])
            lines.append(f"    {limits}  Bayes-optimal")
        trend = [f"{title} {_number(record[key])}{_interval(record, key)}" for key, title in TREND.items()]
        lines.append("    " + "   ".join(trend))
    if record.get("constant"):
        lines.append("    all queries are equally uncertain: there are no levels")
    names = [name for name in part["uncertainty"] if name not in GALLERY_AWARE] + ["entropy"]
    width = max(len(followed(direction, name)) for name in names)
    for name in names:
        record = part["uncertainty"][name]
        lines.append(f"    {followed(direction, name):{width}}  ({record['family']}): {_measures(record)}")
    lines += _calibration(part["calibration"])
    if result.get("val") and "validation" not in part["calibration"]:
        lines.append(f"    no temperature of {result['val']}: too few of its images are mistaken to bound one")
    if "other_score" in result:
        other = result["other_score"]
        recalls = _recalls(direction, other[direction], classes)
        entropy = _measures(other[direction]["uncertainty"]["entropy"])
        lines.append(f"    by {SCORES[other['score']]}  {recalls}; entropy: {entropy}")
    return lines


def _hubs(chosen, direction, plain, recall):
    """What hub correction subtracts, and the R@1, by its name, without it."""
    correction = chosen[direction]
    if correction["kind"] == "none":
        return "    not corrected for hubs: cross-validation on the training queries prefers the score as it is"
    nearest = f"k {correction['k']}, " if correction["k"] else ""
    gain, (low, high) = plain["gain"]["recall"]["1"], plain["gain"]["interval"]["recall"]["1"]
    return (
        f"    corrected for hubs ({correction['kind']}, {nearest}weight {correction['weight']}): {recall}"
        f" {100 * plain['recall']['1']:.1f} without, a gain of {100 * gain:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    )


def _calibration(entries):
    """One line where there is the usual temperature at most, else a line for each entry."""
    errors = {name: _number(entry["ece_15"]) for name, entry in entries.items()}
    if entries.keys() <= {"model", "temperature"}:
        if "temperature" not in entries:
            return []
        expected = entries["model"].get("ece_15_expected")
        chance = "" if expected is None else f" (a calibrated method: {expected:.3f})"
        return [
            f"    calibration error (ECE) {errors['model']}{chance}, after temperature scaling {errors['temperature']}"
        ]
    titles = {name: title.format(**entries[name]) for name, title in PROBABILITIES.items() if name in entries}
    head = "calibration of the"
    width = max(map(len, (head, *titles.values())))
    return [
        f"    {head:{width}}  NLPD   ECE",
        *(f"    {title:{width}} {_number(entries[name]['nll'])} {errors[name]}" for name, title in titles.items()),
    ]


def _measures(record):
    text = f"AUROC {_number(record['auroc'])}{_interval(record, 'auroc')}"
    text += f", of the surest 80 % {100 * record['selective_recall']['80']:.1f} % right"
    return f"{text}, Spearman with the truth {record['spearman']:.3f}" if "spearman" in record else text


def _recalls(direction, part, classes):
    name = "top-" if direction == "image_to_class" else "R@"
    recalls = {k: value for k, value in part["recall"].items() if not classes or int(k) < classes}
    return "  ".join(f"{name}{k} {100 * value:5.1f}" for k, value in recalls.items())


def _number(value):
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"  # None: all answers are right, or all wrong


def _interval(record, name):
    interval = record.get("interval", {}).get(name)
    return f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval and record[name] is not None else ""


def _coco(figures):
    lines = []
    for name, title in COCO.items():
        if isinstance(figures.get(name), dict):
            both = "  ".join(f"{DIRECTIONS[side]} {100 * value:5.1f}" for side, value in figures[name].items())
            title = f"COCO {title}" if title[0].isdigit() else title
            lines.append(f"  {title:11}  {both}")
    return lines


def _hierarchy(figures):
    lines = [f"  {figures['chains']:,} chains of prompts from general to specific; uncertainty by:"]
    for name, record in figures["uncertainty"].items():
        title = "the adaptor" if name == "query" else name
        steps, chains = 100 * record["falling_steps"], 100 * record["falling_chains"]
        lines.append(
            f"    {title:27} falls in {steps:.1f} % of steps, all along {chains:.1f} %;"
            f" Spearman with depth {record['spearman_depth']:.3f}"
        )
    return lines
