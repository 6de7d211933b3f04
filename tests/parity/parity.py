"""The published ImageReward and ours on the same file, images and prompts. Started by run.sh.

parity.py prepare FOLDER            in our environment: weights of full size, random; images
parity.py answers FOLDER original   in the published package's environment: scores, ranks, gradients, pixels
parity.py answers FOLDER ours       in ours
parity.py costs FOLDER NAME         seconds and memory of one of them, a line in FOLDER/costs.jsonl
parity.py compare FOLDER            the verdict, as a table; exit code 1 if they differ
"""

import argparse
import json
import os
import resource
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
SCORE_TOLERANCE = 1e-5  # of scores whose spread is about 0.5; the original differs from itself by 2e-6
GRADIENT_TOLERANCE = 1e-4  # relative
REPEATS = 2
COSTS = ("load, s", "load and first scores, s", "forward, s", "forward and backward, s", "peak memory, GiB")

PROMPTS = {
    "short": "a red fox",
    "empty": "",
    "a sentence": "an oil painting of a lighthouse on a cliff at sunset, with gulls above the sea",
    "long": "a very detailed image of " + "an old wooden house near a river with a boat and " * 6 + "snow",
    "non-English": "Красная лиса в снегу, ねこ と いぬ, 狐狸, château d'été, Übergröße",
    "punctuation": 'WOW!!! $5.00 (a dog\'s) -- "e=mc^2", #1? [MASK] ... @home & <b>',
}


def reference_images() -> dict[str, Image.Image]:
    """One of each kind that could be read differently."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:512, 0:512] / 512
    colours = lambda planes: Image.fromarray((np.stack(planes, -1).clip(0, 1) * 255).astype(np.uint8))  # noqa: E731
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(512))) + 1 / 512
    natural = lambda: np.fft.ifft2(np.fft.fft2(random.normal(size=(512, 512))) / frequency).real  # noqa: E731
    photo = colours([0.5 + plane / plane.std() / 5 for plane in (natural(), natural(), natural())])
    lines = Image.new("RGB", (512, 512), "white")
    for offset in range(0, 1024, 7):
        ImageDraw.Draw(lines).line([(offset, 0), (offset - 300, 512)], fill=(offset % 256, 0, 90))
    alpha = Image.fromarray((y * 255).astype(np.uint8))
    rgba = photo.copy()
    rgba.putalpha(alpha)
    return {
        "smooth": colours([x, y, 0.5 + np.sin(5 * x + 3 * y) / 2]),
        "photo-like noise": photo,
        "white noise": Image.fromarray(random.integers(0, 256, (512, 512, 3), dtype=np.uint8)),
        "wide": photo.resize((768, 320)),
        "tall": photo.resize((300, 701)),
        "grey": photo.convert("L"),
        "RGBA": rgba,
        "thin lines": lines,
    }


def more_images() -> dict[str, Image.Image]:
    """Further sizes and modes, for preprocessing alone."""
    photo = reference_images()["photo-like noise"]
    sizes = ((224, 224), (225, 224), (100, 90), (31, 500), (223, 447), (1000, 37), (513, 511))
    found = {f"{width}x{height}": photo.resize((width, height)) for width, height in sizes}
    found |= {mode: photo.convert(mode) for mode in ("P", "1", "LA", "CMYK", "YCbCr")}
    found["LA"].putalpha(reference_images()["smooth"].getchannel("R"))
    return found


ALL_IMAGES = reference_images() | more_images()


# -------------------------------------------------------------------------------------- the two, made alike


class Original:
    """The published package. `reward` does what its training script does with a decoded image."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype):
        # Its torchvision may be built for CUDA beside a torch that is not; these parts, operators for
        # detection, then fail to register, and nothing here needs them.
        for name in ("_meta_registrations", "_autograd_registrations"):
            sys.modules[f"torchvision.{name}"] = types.ModuleType(name)
        os.chdir(folder)  # it loads the tokenizer of the name bert-base-uncased: the folder of that name
        import ImageReward
        from torchvision import transforms

        started = time.perf_counter()
        self.model = ImageReward.load(
            str(folder / "ImageReward.pt"), device, None, str(folder / "med_config.json")
        )
        self.model.requires_grad_(False).to(dtype)
        self.load_seconds = time.perf_counter() - started
        self.device, self.dtype = device, dtype
        normalize = self.model.preprocess.transforms[-1]
        bicubic = transforms.InterpolationMode.BICUBIC
        self.transform = transforms.Compose(
            [transforms.Resize(224, interpolation=bicubic), transforms.CenterCrop(224), normalize]
        )
        self.score, self.rank = self.model.score, self.model.inference_rank

    def pixels(self, image):
        return self.model.preprocess(image)

    def reward(self, images, prompts):
        tokens = self.model.blip.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        ).to(self.device)
        pixels = self.transform(images).to(self.dtype)
        return self.model.score_gard(tokens.input_ids, tokens.attention_mask, pixels).squeeze(-1)


class Ours:
    """refl.imagereward, as training and people use it."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype):
        sys.path.insert(0, str(ROOT))
        from refl.reward import imagereward

        started = time.perf_counter()
        self.model = imagereward.load(folder, device, dtype)
        self.load_seconds = time.perf_counter() - started
        self.preprocess = imagereward.preprocess_pil
        self.score, self.rank, self.reward = self.model.score, self.model.rank, self.model

    def pixels(self, image):
        return self.preprocess(image, 224)[0]


SIDES = {"original": Original, "ours": Ours}


def to_tensor(image: Image.Image) -> torch.Tensor:  # (1, 3, H, W) in [0, 1]
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def gradient(side, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B,) and d score / d image (B, 3, H, W)."""
    images = images.requires_grad_()
    scores = side.reward(images, prompts)
    return scores.detach(), torch.autograd.grad(scores.sum(), images)[0]


# ------------------------------------------------------------------------------------------------- commands


def prepare(folder: Path) -> None:
    """Write the files of a full-size ImageReward with random weights."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from random_checkpoint import SIZES, write_reward

    torch.manual_seed(0)
    write_reward(folder, SIZES["full"])


def answers(folder: Path, name: str) -> None:
    """What one side makes of all images and prompts, into FOLDER/NAME.npz."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # float32 is meant
    side = SIDES[name](folder, device, torch.float32)
    found = {}
    for kind, image in ALL_IMAGES.items():
        found[f"pixels/{kind}"] = side.pixels(image)
    shown = list(reference_images().values())
    for label, prompt in tqdm(PROMPTS.items(), f"{name}: scores", unit="prompt"):
        with torch.no_grad():
            found[f"score/{label}"] = torch.tensor([side.score(prompt, image) for image in shown])
            ranks, scores = side.rank(prompt, shown)
        found[f"rank/{label}"], found[f"rank_score/{label}"] = torch.tensor(ranks), torch.tensor(scores)
    for kind, image in tqdm(reference_images().items(), f"{name}: gradients", unit="image"):
        images = to_tensor(image).to(device).repeat(len(PROMPTS), 1, 1, 1)
        found[f"training_score/{kind}"], found[f"gradient/{kind}"] = gradient(
            side, images, list(PROMPTS.values())
        )
    if name == "ours":  # what half precision costs in exactness
        half = SIDES[name](folder, device, torch.bfloat16)
        images = torch.cat(
            [to_tensor(reference_images()[kind]) for kind in ("smooth", "photo-like noise", "thin lines")]
        )
        prompts = list(PROMPTS.values())[:3]
        for label, some in (("full", side), ("half", half)):
            found[f"{label}/score"], found[f"{label}/gradient"] = gradient(some, images.to(device), prompts)
    np.savez(folder / f"{name}.npz", **{key: value.float().cpu().numpy() for key, value in found.items()})


def costs(folder: Path, name: str) -> None:
    """Seconds of loading, scoring, and forward with backward, a batch of four images, and peak memory."""
    is_cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if is_cuda else ("cpu", torch.float32)  # half pays on a GPU only
    side = SIDES[name](folder, device, dtype)
    images = to_tensor(reference_images()["photo-like noise"]).repeat(4, 1, 1, 1).to(device)
    prompts = list(PROMPTS.values())[:4]

    def seconds(work) -> float:
        started = time.perf_counter()
        work()
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    with torch.no_grad():
        first = seconds(lambda: side.reward(images, prompts))  # reads what is only mapped so far
        forward = min(seconds(lambda: side.reward(images, prompts)) for _ in range(REPEATS))
    both = min(seconds(lambda: gradient(side, images, prompts)) for _ in range(REPEATS))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    peak = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else kilobytes / 2**20
    measured = (side.load_seconds, side.load_seconds + first, forward, both, peak)
    found = {"side": name} | dict(zip(COSTS, measured, strict=True))
    found["device"] = f"CPU, {torch.get_num_threads()} threads, {dtype}"
    if is_cuda:
        found["device"] = f"{torch.cuda.get_device_name()}, {dtype}"
    with open(folder / "costs.jsonl", "a") as file:
        file.write(json.dumps(found) + "\n")


def compare(folder: Path) -> int:
    """Print what agrees and what does not, and what each costs; 1 if anything does not agree."""
    original, ours = (np.load(folder / f"{name}.npz") for name in SIDES)

    def gather(side, kind: str) -> np.ndarray:
        return np.concatenate([side[key].ravel() for key in original.files if key.startswith(f"{kind}/")])

    def largest(kind: str) -> float:
        return abs(gather(original, kind) - gather(ours, kind)).max()

    def relative(a: np.ndarray, b: np.ndarray) -> float:  # (B, 3, H, W) each
        return max(np.linalg.norm(x - y) / np.linalg.norm(x) for x, y in zip(a, b, strict=True))

    gradients = [key for key in original.files if key.startswith("gradient/")]
    pairs = f"{len(PROMPTS)} prompts x {len(reference_images())} images"
    checks = (
        (f"pixels of {len(ALL_IMAGES)} images", largest("pixels"), 0),
        (f"score, {pairs}", largest("score"), SCORE_TOLERANCE),
        ("score by ranking", largest("rank_score"), SCORE_TOLERANCE),
        ("score in training", largest("training_score"), SCORE_TOLERANCE),
        ("places by ranking", largest("rank"), 0),
        (
            "image's gradient, relative",
            max(relative(original[key], ours[key]) for key in gradients),
            GRADIENT_TOLERANCE,
        ),
    )
    print("\n| largest difference | measured | allowed | |\n|---|---|---|---|")
    for what, measured, allowed in checks:
        print(f"| {what} | {measured:.1e} | {allowed:.0e} | {'ok' if measured <= allowed else 'DIFFERS'} |")
    agree = all(measured <= allowed for _, measured, allowed in checks)

    scores = gather(original, "score")
    agree &= scores.std() > 0.1  # otherwise agreement would mean little
    print(f"\nscores from {scores.min():+.2f} to {scores.max():+.2f}, standard deviation {scores.std():.2f}")
    kinds = [
        index for index, kind in enumerate(reference_images()) if kind != "RGBA"
    ]  # a tensor has no alpha
    by_image = np.stack([ours[f"score/{label}"] for label in PROMPTS])[:, kinds]
    by_tensor = np.stack([ours[f"training_score/{kind}"] for kind in reference_images()], axis=1)[:, kinds]
    apart = abs(by_image - by_tensor)
    print(f"ours, tensors against images of 8 bits: median {np.median(apart):.4f}, at most {apart.max():.4f}")
    half = abs(ours["half/score"] - ours["full/score"]).max()
    share = relative(ours["full/gradient"], ours["half/gradient"])
    print(f"ours, bfloat16 against float32: score within {half:.3f}, gradient within {share:.1%}")

    lines = [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()]
    device = f"{lines[0]['device']}; 4 images of 512x512"
    print(f"\n| {device} | original | ours | ours / original |\n|---|---|---|---|")
    for key in COSTS:
        a, b = (min(line[key] for line in lines if line["side"] == name) for name in SIDES)
        print(f"| {key} | {a:.2f} | {b:.2f} | {b / a:.2f} |")
    print(f"\nparity: {'passed' if agree else 'FAILED'}")
    return int(not agree)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("prepare", "answers", "costs", "compare"))
    parser.add_argument("folder", type=lambda path: Path(path).resolve())
    parser.add_argument("name", nargs="?", choices=SIDES)
    arguments = parser.parse_args()
    command = {"prepare": prepare, "answers": answers, "costs": costs, "compare": compare}[arguments.command]
    sys.exit(command(arguments.folder, *([arguments.name] if arguments.name else [])))
