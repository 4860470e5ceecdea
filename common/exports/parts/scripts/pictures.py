"""Prints what the exported network tells of pictures: `python predict.py PICTURE ...`.

Needs onnxruntime, numpy and pillow.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FOLDER = Path(__file__).resolve().parent
STATED = json.loads((FOLDER / "preprocessing.json").read_text(encoding="utf-8"))
USAGE = "usage: python predict.py PICTURE ..."


class UnfitPicture(Exception):
    """A picture that opens, and that the network does not take."""


def read(path: str) -> np.ndarray:
    """Returns the pixels of a picture as the network reads them, channels by rows by columns."""
    image, divisor = ImageOps.exif_transpose(Image.open(path)), None
    for step in STATED["before"]:
        if step["step"] == "convert":
            if image.mode not in step["modes"]:
                raise UnfitPicture("expected 8 bits per value; convert it with a window of your choice first")
            image = image.convert(step["mode"])
        elif step["step"] == "resize":
            if not step["antialias"]:
                sys.exit("expected a network whose pictures are resized as Pillow does; use preprocessing.json")
            short = min(image.size)
            size = [step["size"]] * 2
            if step["side"] == "shorter":
                size = [step["size"] if side == short else int(step["size"] * side / short) for side in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling[step["interpolation"].upper()])
        elif step["step"] == "center_crop":
            left, top = (round((side - step["size"]) / 2) for side in image.size)
            image = image.crop((left, top, left + step["size"], top + step["size"]))
        elif step["step"] == "expect_size" and image.size != (step["size"], step["size"]):
            raise UnfitPicture(f"expected {step['size']} x {step['size']} pixels, got another size")
        elif step["step"] == "divide":
            divisor = np.float32(step["by"])
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return pixels if divisor is None else pixels.astype(np.float32) / divisor


if __name__ == "__main__":
    asked = sys.argv[1:2] in (["-h"], ["--help"])
    if asked or not sys.argv[1:]:
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    failed = 0
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx")
    print(",".join(["record", *(f"{out['task']}: {name}" for out in STATED["outputs"] for name in out["columns"])]))
    for path in sys.argv[1:]:
        try:
            served = session.run(None, {STATED["inputs"][0]["name"]: read(path)[None]})
        except Exception as error:  # Pillow raises many kinds; one picture costs itself only.
            other = f"expected a picture that Pillow opens, got {type(error).__name__}"
            print(f"{path}: {error if isinstance(error, UnfitPicture) else other}", file=sys.stderr)
            failed = 1
            continue
        print(",".join([path, *(f"{value:.7g}" for part in served for value in part[0])]))
    sys.exit(failed)
