"""The rewards on CLIP and their originals on the same files, images and prompts. Started by run.sh.

clips.py prepare FOLDER NAME     files of full size with random weights, in the originals' environment
clips.py original FOLDER NAME    what the original makes of them, in the originals' environment
clips.py ours FOLDER NAME        what ours makes of them, in ours
clips.py compare FOLDER NAME     the verdict, as lines of a table; exit code 1 if they differ

The originals: `hpsv2` 1.2.0 (its model, preprocessing, tokenizer and scoring), transformers' `CLIPModel` and
`CLIPProcessor` as PickScore's model card uses them, `open_clip_torch` for CLIP and below the aesthetic
predictors' heads, which are written down here as published.
"""

import argparse
import contextlib
import gzip
import json
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # in place of this folder, which has a module `parity`
import numpy as np
import torch
from parity.parity import more_images, reference_images, to_tensor
from torch import Tensor, nn

SCORE_TOLERANCE = 1e-5  # of the largest score
GRADIENT_TOLERANCE = 1e-4  # relative, of each image
PIXEL_TOLERANCE = 1e-5  # in standard deviations, where a level of 255 is 0.015
IMAGES_WITH_GRADIENT = ("photo-like noise", "wide", "tall")
HPS = "HPS_v2_compressed.pt"
VOCABULARY = "CLIP-ViT-H-14-laion2B-s32B-b79K"
OPENAI = "clip-vit-large-patch14"
REWARDS = {  # by the name of a run: the rewards that it compares
    "pickscore": ("pickscore",),
    "hpsv2": ("hpsv2",),
    "clip": ("clip", "aesthetic_v1", "aesthetic_v2"),
}
PROMPTS = {
    "short": "a red fox",
    "long": "a very detailed image of " + "an old wooden house near a river with a boat and " * 9 + "snow",
    "empty": "",
    "emoji": "a 🦊 in the snow ❄️, with its family 👨‍👩‍👧",
    "Chinese": "一只红色的狐狸,坐在雪地里!",
    "marks": "the fox’s “den” &amp; CAFÉ … ﬁne,  $5.00 (e=mc^2) #1? <b>",
}


def pictures() -> dict:
    """Eight images of different kinds; three channels, because the originals refuse or ignore a fourth."""
    return {kind: image.convert("RGB") for kind, image in reference_images().items()}


def hide_broken_torchvision() -> None:
    """Skip the parts of a torchvision for CUDA that fail beside a torch for CPUs; nothing here needs them."""
    for name in ("_meta_registrations", "_autograd_registrations"):
        sys.modules[f"torchvision.{name}"] = types.ModuleType(name)


# ------------------------------------------------------------------------------------------------- the files


def prepare(folder: Path, name: str) -> None:
    """Write the files of one run: published names and formats, random weights, CLIP's own vocabulary."""
    from random_checkpoint import (
        SIZES,
        clip_config,
        open_clip_weights,
        write_aesthetic_heads,
        write_clip_folder,
    )

    torch.manual_seed(0)
    spec = SIZES["full"]["clip_l" if name == "clip" else "clip_h"]
    weights = open_clip_weights(spec)
    if name == "clip":
        write_clip_folder(folder / OPENAI, spec, weights)
        torch.save(weights, folder / "open_clip.pt")
        write_aesthetic_heads(folder, spec["width"])
    elif name == "pickscore":
        write_clip_folder(folder / "PickScore_v1", spec, weights)
    else:
        torch.save({"state_dict": weights}, folder / HPS)
    vocabulary = folder / (OPENAI if name == "clip" else VOCABULARY)
    clip_config(spec).save_pretrained(vocabulary)
    write_vocabulary(vocabulary)


def write_vocabulary(folder: Path) -> None:
    """CLIP's vocabulary, which open_clip brings, as transformers' vocab.json and merges.txt."""
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    words = list(SimpleTokenizer().encoder)
    words[-2:] = "<|startoftext|>", "<|endoftext|>"
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[: 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines[1:]]) + "\n")


# -------------------------------------------------------------------------------------- the two, made alike


class Original:
    """What an original has: `ids` and embeddings, `prompts`, of the prompts; `pixels` of a PIL image, and
    `pixels_of` tensors by the same transform; `embed`, which makes image embeddings of pixels."""

    def scores(self, images: Tensor) -> dict[str, Tensor]:
        """(images, prompts) of each reward, from image embeddings."""
        return {self.name: self.scale * images @ self.prompts.T}


class HpsV2(Original):
    """The package's own code; only the download of other weights and a progress bar are left out."""

    name, scale = "hpsv2", 1.0

    def __init__(self, folder: Path):
        import open_clip

        for module in ("clint", "clint.textui"):
            sys.modules[module] = types.ModuleType(module)
        sys.modules["clint.textui"].progress = None
        real_open = gzip.open  # the package lacks its vocabulary; open_clip has the same file
        vocabulary = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
        gzip.open = lambda path, *rest: real_open(vocabulary if "hpsv2" in str(path) else path, *rest)
        from hpsv2 import img_score

        gzip.open = real_open
        self.model, _, self.transform = img_score.create_model_and_transforms(
            "ViT-H-14", None, precision="fp32", device="cpu", jit=False, force_quick_gelu=False,
            force_custom_text=False, light_augmentation=True, output_dict=True, with_score_predictor=False,
            with_region_predictor=False,
        )  # fmt: skip
        img_score.model_dict |= {"model": self.model, "preprocess_val": self.transform}
        self.package_score = lambda image, prompt: img_score.score(image, prompt, str(folder / HPS))[0]
        self.model.load_state_dict(torch.load(folder / HPS, mmap=True)["state_dict"])
        self.model.eval().requires_grad_(False)
        self.ids = img_score.get_tokenizer("ViT-H-14")(list(PROMPTS.values()))
        self.prompts = self.model.encode_text(self.ids, normalize=True)

    def pixels(self, image):
        return self.transform(image)[None]

    def pixels_of(self, images):
        return torch.stack([nn.Sequential(*self.transform.transforms[2:])(image) for image in images])

    def embed(self, pixels):
        return self.model.encode_image(pixels, normalize=True)


class PickScore(Original):
    """As the model card: processor, features, cosine times exp(logit_scale); with eager attention."""

    name = "pickscore"

    def __init__(self, folder: Path):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.model = CLIPModel.from_pretrained(folder / "PickScore_v1", attn_implementation="eager").eval()
        self.model.requires_grad_(False)
        self.process, self.process_tensors = CLIPImageProcessorPil(), CLIPImageProcessor()
        tokens = CLIPTokenizer.from_pretrained(folder / VOCABULARY)(
            list(PROMPTS.values()), padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        self.ids = tokens.input_ids
        prompts = self.model.get_text_features(**tokens).pooler_output
        self.prompts = prompts / prompts.norm(dim=-1, keepdim=True)
        self.scale = self.model.logit_scale.exp()

    def pixels(self, image):
        return self.process(image, return_tensors="pt").pixel_values

    def pixels_of(self, images):
        return self.process_tensors(list(images), do_rescale=False, return_tensors="pt").pixel_values

    def embed(self, pixels):
        features = self.model.get_image_features(pixel_values=pixels).pooler_output
        return features / features.norm(dim=-1, keepdim=True)


class OpenClip(Original):
    """open_clip's ViT-L/14 with OpenAI's activation, and both heads as published."""

    def __init__(self, folder: Path):
        import open_clip

        self.model, _, self.transform = open_clip.create_model_and_transforms("ViT-L-14-quickgelu")
        self.model.load_state_dict(torch.load(folder / "open_clip.pt", mmap=True))
        self.model.eval().requires_grad_(False)
        self.ids = open_clip.get_tokenizer("ViT-L-14")(list(PROMPTS.values()))
        self.prompts = self.model.encode_text(self.ids, normalize=True)
        self.linear = nn.Linear(768, 1).eval().requires_grad_(False)
        self.linear.load_state_dict(torch.load(folder / "sa_0_4_vit_l_14_linear.pth"))
        layers = [nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)]
        layers += [nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
        self.deep = nn.ModuleDict({"layers": nn.Sequential(*layers)}).eval().requires_grad_(False)
        self.deep.load_state_dict(torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth"))

    def pixels(self, image):
        return self.transform(image)[None]

    def pixels_of(self, images):
        resize, crop, *_, normalize = self.transform.transforms
        return normalize(crop(resize(images)))

    def embed(self, pixels):
        return self.model.encode_image(pixels, normalize=True)

    def scores(self, images):
        ratings = {"aesthetic_v1": self.linear(images), "aesthetic_v2": self.deep["layers"](images)}
        return {"clip": images @ self.prompts.T} | {
            name: rating.expand(-1, len(PROMPTS)) for name, rating in ratings.items()
        }


ORIGINALS = {"pickscore": PickScore, "hpsv2": HpsV2, "clip": OpenClip}


def original(folder: Path, name: str) -> dict[str, Tensor]:
    """Pixels, token ids, scores of all pairs, and gradients of the mean score over the prompts."""
    side = ORIGINALS[name](folder)
    found = {f"pixels/{kind}": side.pixels(image) for kind, image in all_pictures().items()}
    shown = pictures()
    with torch.no_grad():
        embeddings = torch.cat([side.embed(found[f"pixels/{kind}"]) for kind in shown])
    found |= {f"score/{reward}": scores for reward, scores in side.scores(embeddings).items()}
    found["ids"] = side.ids
    for kind in IMAGES_WITH_GRADIENT:
        image = to_tensor(shown[kind]).requires_grad_()
        scores = side.scores(side.embed(side.pixels_of(image)))
        gradients(found, kind, image, scores)
    if name == "hpsv2":  # its own function from an image to a number
        image, prompt = shown["wide"], PROMPTS["marks"]
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            found["by_package"] = torch.tensor([side.package_score(image, prompt)])
    return found


def ours(folder: Path, name: str) -> dict[str, Tensor]:
    """The same by the rewards of --reward."""
    from refl.reward import rewards

    loaded = rewards.load(",".join(REWARDS[name]), folder, torch.device("cpu"), torch.float32).rewards
    first = loaded[REWARDS[name][0]]
    tower, shown, found = first.tower, pictures(), {}
    found |= {f"pixels/{kind}": first.preprocess_pil(image) for kind, image in all_pictures().items()}
    with torch.no_grad():
        embeddings = torch.cat([tower.embed_pixels(found[f"pixels/{kind}"]) for kind in shown])
        for reward, own in loaded.items():
            columns = [own.score_embeddings(embeddings, [prompt] * len(shown)) for prompt in PROMPTS.values()]
            found[f"score/{reward}"] = torch.stack(columns, dim=1)
    found["ids"] = torch.cat([tower.tokenize(prompt) for prompt in PROMPTS.values()])
    prompts = list(PROMPTS.values())
    for kind in IMAGES_WITH_GRADIENT:
        image = to_tensor(shown[kind]).requires_grad_()
        embedding = tower.embed_images(image).expand(len(prompts), -1)
        gradients(
            found, kind, image,
            {reward: own.score_embeddings(embedding, prompts) for reward, own in loaded.items()},
        )  # fmt: skip
    if name == "hpsv2":
        found["by_package"] = torch.tensor([first.score(PROMPTS["marks"], shown["wide"])])
    return found


def gradients(found: dict[str, Tensor], kind: str, image: Tensor, scores: dict[str, Tensor]) -> None:
    """Add d mean score / d image of each reward to `found`."""
    for reward, own in scores.items():
        (gradient,) = torch.autograd.grad(own.mean(), image, retain_graph=True)
        found[f"gradient/{reward}/{kind}"] = gradient


def all_pictures() -> dict:
    """Those that are scored, and more sizes."""
    sizes = {kind: image for kind, image in more_images().items() if "x" in kind}
    return pictures() | sizes


def until_end(ids: np.ndarray) -> list[list[int]]:
    """The ids of each prompt up to its first end; what follows, the padding, is never looked at."""
    return [row[: row.argmax() + 1].tolist() for row in ids.astype(int)]


def compare(folder: Path, name: str) -> int:
    """Print what agrees and what does not; 1 if anything does not agree."""
    theirs, ours = (np.load(folder / f"{side}.npz") for side in ("original", "ours"))
    pixels = [key for key in theirs.files if key.startswith("pixels/")]
    apart = max(abs(theirs[key] - ours[key]).max() for key in pixels)
    is_equal = until_end(theirs["ids"]) == until_end(ours["ids"])
    agree = True
    for reward in REWARDS[name]:
        a, b = theirs[f"score/{reward}"], ours[f"score/{reward}"]
        kinds = [f"gradient/{reward}/{kind}" for kind in IMAGES_WITH_GRADIENT]
        norm = np.linalg.norm
        checks = {
            "score": (abs(a - b).max() / abs(a).max(), SCORE_TOLERANCE),
            "gradient": (
                max(norm(theirs[key] - ours[key]) / norm(theirs[key]) for key in kinds),
                GRADIENT_TOLERANCE,
            ),
            "pixels": (apart, PIXEL_TOLERANCE),
            "ranks": (float((a.argsort(0) != b.argsort(0)).sum()), 0),
            "tokens": (float(not is_equal), 0),
        }
        if "by_package" in theirs:
            checks["package"] = (abs(theirs["by_package"] / ours["by_package"] - 1).item(), SCORE_TOLERANCE)
        fine = all(measured <= allowed for measured, allowed in checks.values()) and a.std(0).min() > 1e-3
        agree &= fine
        cells = ", ".join(f"{what} {measured:.1e}" for what, (measured, _) in checks.items())
        print(f"{reward}: {cells}; scores {a.min():.3f} to {a.max():.3f}: {'ok' if fine else 'DIFFERS'}")
    return int(not agree)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("prepare", "original", "ours", "compare"))
    parser.add_argument("folder", type=lambda path: Path(path).resolve())
    parser.add_argument("name", choices=REWARDS)
    arguments = parser.parse_args()
    if arguments.command != "ours":
        hide_broken_torchvision()
    commands = {"prepare": prepare, "original": original, "ours": ours, "compare": compare}
    answer = commands[arguments.command](arguments.folder, arguments.name)
    if isinstance(answer, dict):
        np.savez(
            arguments.folder / f"{arguments.command}.npz",
            **{key: value.detach().numpy() for key, value in answer.items()},
        )
    elif answer:
        sys.exit(answer)
