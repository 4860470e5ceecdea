"""Prints what the exported network tells of pictures: `python predict.py [--masks FOLDER] [--boxes FILE] PICTURE ...`.

Where a record is a bag of pictures, each argument is a folder that holds one.

With --masks, writes the mask of each picture where the network has masks: grey PNG of the picture's own size, whose
values are the places of the labels in preprocessing.json. With --boxes, writes the boxes of all pictures, where it has
boxes, as one JSON file in COCO's format. Needs onnxruntime, numpy and pillow.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FOLDER = Path(__file__).resolve().parent
STATED = json.loads((FOLDER / "preprocessing.json").read_text(encoding="utf-8"))
USAGE = "usage: python predict.py [--masks FOLDER] [--boxes FILE] PICTURE ..."
BAG = next((step for step in STATED.get("before", []) if step["step"] == "items"), None)


class UnfitPicture(Exception):
    """A picture that opens, and that the network does not take."""


def sum_up(stated: dict[str, Any], told: np.ndarray) -> list[float]:
    """Returns the columns of what the network tells of one picture for a task; maps are summed up over their places."""
    if "maps" in stated:
        flat = told.reshape(len(told), -1)[: len(stated["columns"])]
        told = flat.mean(axis=1) if stated["column_of_map"] == "mean" else flat.max(axis=1)
    return [float(value) for value in told]


def write_masks(folder: Path, path: str, size: tuple[int, int], told: list[np.ndarray]) -> None:
    """Writes a picture's masks, each place the label of the nearest.

    Args:
        folder: folder of the masks.
        path: the picture's file.
        size: width and height of the picture.
        told: what the network tells of it, for each task.
    """
    masks = [
        (out["task"], maps)
        for out, maps in zip(STATED["outputs"], told, strict=True)
        if out.get("prediction") == "mask"
    ]
    for task, maps in masks:
        own = maps.argmax(axis=0).astype(np.uint8)
        columns, rows = (
            (np.arange(wanted) * 2 + 1) * side // (2 * wanted)
            for wanted, side in zip(size, own.shape[::-1], strict=True)
        )
        name = f"{Path(path).stem}.png" if len(masks) == 1 else f"{Path(path).stem}.{task}.png"
        folder.mkdir(exist_ok=True)
        Image.fromarray(own[np.ix_(rows, columns)]).save(folder / name)


def collect_boxes(path: str, size: tuple[int, int], told: list[np.ndarray], coco: dict[str, list[Any]]) -> None:
    """Adds a picture and its boxes, in pixels, to lists as COCO's files have them.

    Args:
        path: the picture's file.
        size: width and height of the picture.
        told: what the network tells of it, for each task.
        coco: the lists.
    """
    from boxes import find_boxes  # Beside this file where the network has boxes.

    known = {each["name"]: each["id"] for each in coco["categories"]}
    number = len(coco["images"]) + 1
    coco["images"].append({"id": number, "file_name": path, "width": size[0], "height": size[1]})
    for stated, maps in zip(STATED["outputs"], told, strict=True):
        for label, score, sides in find_boxes(maps, stated) if "boxes" in stated else ():
            left, top, right, bottom = (side * size[axis % 2] for axis, side in enumerate(sides))
            if right > left and bottom > top:
                box = [round(each, 2) for each in (left, top, right - left, bottom - top)]
                own = {"id": len(coco["annotations"]) + 1, "image_id": number, "category_id": known[label]}
                area = round((right - left) * (bottom - top), 2)
                coco["annotations"].append({**own, "bbox": box, "area": area, "iscrowd": 0, "score": round(score, 6)})


def list_categories() -> list[dict[str, Any]]:
    """Returns the labels of all boxes, numbered from 1; none where the network has no boxes."""
    labels = [name for out in STATED["outputs"] if "boxes" in out for name in out["maps"][: len(out["columns"])]]
    return [{"id": number, "name": name} for number, name in enumerate(dict.fromkeys(labels), start=1)]


def read(opened: Image.Image) -> np.ndarray:
    """Returns the pixels of a picture as the network reads them, channels by rows by columns."""
    image, divisor = opened, None
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


def read_record(path: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the pixels of a picture and its size, or those of all pictures of a folder where a record is a bag."""
    if BAG is None:
        opened = ImageOps.exif_transpose(Image.open(path))
        return read(opened), opened.size
    files = sorted(each for each in Path(path).iterdir() if each.is_file() and not each.name.startswith("."))
    count, most = len(files), BAG["most"]
    if not files or (count > most and BAG["more"] == "refused"):
        raise UnfitPicture(f"expected a folder with one to {most} pictures, got {count}")
    if count > most:
        files = [files[int((2 * number + 1) * count / (2 * most))] for number in range(most)]
    return np.stack([read(ImageOps.exif_transpose(Image.open(each))) for each in files]), (0, 0)


if __name__ == "__main__":
    asked = sys.argv[1:2] in (["-h"], ["--help"])
    options: dict[str, Path] = {}
    paths = sys.argv[1:]
    while paths[:1] in (["--masks"], ["--boxes"]) and len(paths) > 1:
        options[paths[0]], paths = Path(paths[1]), paths[2:]
    masks, boxes = options.get("--masks"), options.get("--boxes")
    if asked or not paths:
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    coco: dict[str, list[Any]] = {"images": [], "categories": list_categories(), "annotations": []}
    if boxes is not None and not coco["categories"]:
        sys.exit("--boxes: expected a network with boxes, got one without")
    failed = 0
    session = onnxruntime.InferenceSession(FOLDER / "model.onnx")
    print(",".join(["record", *(f"{out['task']}: {name}" for out in STATED["outputs"] for name in out["columns"])]))
    for path in paths:
        try:
            pixels, size = read_record(path)
            told = [part[0] for part in session.run(None, {STATED["inputs"][0]["name"]: pixels[None]})]
            if masks is not None:
                write_masks(masks, path, size, told)
            if boxes is not None:
                collect_boxes(path, size, told, coco)
        except Exception as error:  # Pillow raises many kinds; one picture costs itself only.
            other = f"expected a picture that Pillow opens, got {type(error).__name__}"
            print(f"{path}: {error if isinstance(error, UnfitPicture) else other}", file=sys.stderr)
            failed = 1
            continue
        values = [value for out, part in zip(STATED["outputs"], told, strict=True) for value in sum_up(out, part)]
        print(",".join([path, *(f"{value:.7g}" for value in values)]))
    if boxes is not None:
        boxes.write_text(json.dumps(coco, ensure_ascii=False), encoding="utf-8")
    sys.exit(failed)
