"""What the oracle says of an evaluation beyond how many images are right.

python demo/verdicts.py result/demo/evaluation

Compares each LoRA with the base model, each at its best guidance: the share of images that lose an attribute
which the base model had right, and how much place and size of the shapes vary, a measure of diversity that
does not come from the trained reward.
"""

import csv
import json
import sys
from pathlib import Path

import judge
import numpy as np
from PIL import Image

LOSABLE = ("colour", "shape", "background")


def read(folder: Path, case: dict, num_prompts: int, num_images: int) -> list[np.ndarray]:
    """Read the images of a case, ordered by prompt and image."""
    files = [
        folder / f"images/{case['folder']}/{i}_{j}.png" for i in range(num_prompts) for j in range(num_images)
    ]
    return [np.asarray(Image.open(file)) for file in files]


def variation(images: list[np.ndarray]) -> dict[str, float]:
    """Standard deviation of centre and radius, in pixels, of the shapes that can be read."""
    verdicts = [judge.judge(image) for image in images]
    x, y, radius = np.array([v.geometry for v in verdicts if v.shape]).T
    return {"place": float(np.hypot(x.std(), y.std())), "size": float(radius.std())}


def main() -> None:
    """Read an evaluation, grade its best cases, print and save the comparison."""
    folder = Path(sys.argv[1])
    evaluation = json.loads((folder / "evaluation.json").read_text())
    best, cases = evaluation["best_against_best"], evaluation["cases"]
    with open(folder / "images.csv", newline="") as file:
        prompts = [row["prompt"] for row in csv.DictReader(file) if row["case"] == cases[0]["name"]]
    shape = evaluation["num_prompts"], evaluation["num_images_per_prompt"]
    before = read(folder, cases[best["base"]], *shape)
    graded, varied = judge.grade(before, prompts), variation(before)
    results = {"base": {"variation": varied}}
    for own in best["loras"]:
        case = cases[own["case"]]
        after = read(folder, case, *shape)
        regraded, variation_after = judge.grade(after, prompts), variation(after)
        lost = {name: float((graded[name] & ~regraded[name]).mean()) for name in LOSABLE}
        lost["any"] = float(np.any([graded[name] & ~regraded[name] for name in LOSABLE], axis=0).mean())
        errors = float((~regraded["all_right"]).mean() / (~graded["all_right"]).mean())
        ratios = {name: variation_after[name] / varied[name] for name in varied}
        results[case["name"]] = {
            "errors_left": errors, "lost": lost, "variation": variation_after, "variation_kept": ratios,
        }  # fmt: skip
        print(
            f"{case['name']}: {errors:.0%} of the base model's errors are left; {lost['any']:.1%} of the "
            f"images lost an attribute; place varies {ratios['place']:.0%} as much, size {ratios['size']:.0%}"
        )
    (folder / "verdicts.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
