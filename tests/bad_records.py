"""Records of every bad kind with the code each must get, and the pictures they speak of."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image


def write_folder(tmp_path: Path) -> Path:
    """`images` with four good pictures and several bad ones; `secret.png` lies beside it."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png", "sub/d.png", "../secret.png"):
        Image.new("RGB", (8, 6)).save(images / name)
    (images / "empty.jpg").write_bytes(b"")
    (images / "page.jpg").write_bytes(b"<html>404</html>")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:20])
    Image.new("RGB", (1, 300)).save(images / "narrow.png")
    size = struct.pack(">IIBBBBB", 9500, 9500, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + b"IHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size))
    (images / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT" + b"x" * 13)
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    return images


def record(
    question: str = "<image>\nWhat?", answer: str = "A square.", image: Any = "a.png", **more: Any
) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "x", **({} if image is None else {"image": image}), "conversations": turns, **more}


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": who, "value": value} for who, value in pairs]}


BAD: dict[str, tuple[str, Any]] = {  # one of each kind
    "not an object": ("D102", "hello"),
    "null": ("D102", None),
    "a list": ("D102", [1]),
    "no conversations": ("D102", {"id": 1, "image": "a.png"}),
    "conversations misspelt": ("D102", {"id": 1, "conversation": []}),
    "conversations empty": ("D102", {"id": 1, "conversations": []}),
    "conversations null": ("D102", {"id": 1, "conversations": None}),
    "conversations a dict": ("D102", {"id": 1, "conversations": {"from": "human"}}),
    "turn a string": ("D102", {"id": 1, "conversations": ["hi", "ho"]}),
    "turn without value": ("D102", {"id": 1, "conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}),
    "value a number": ("D102", turns(("human", 3), ("gpt", "x"))),
    "answer null": ("D102", turns(("human", "q"), ("gpt", None))),
    "role unknown": ("D102", turns(("human", "q"), ("bot", "x"))),
    "role null": ("D102", turns((None, "q"), ("gpt", "x"))),
    "role a list": ("D102", turns((["human"], "q"), ("gpt", "x"))),
    "two questions in a row": ("D102", turns(("human", "q"), ("human", "q"), ("gpt", "x"))),
    "assistant first": ("D102", turns(("gpt", "x"), ("human", "q"))),
    "last question unanswered": ("D102", turns(("human", "q"), ("gpt", "x"), ("human", "q"))),
    "image a number": ("D102", record(image=3)),
    "image a dict": ("D102", record(image={"path": "a.png"})),
    "image an empty name": ("D102", record(image="")),
    "image list with null": ("D102", record(image=["a.png", None])),
    "image and images": ("D102", record(images=["a.png"])),
    "image missing": ("D103", record(image="aa.png")),
    "image in another case": ("D103", record(image="A.PNG")),
    "image a folder": ("D103", record(image="sub")),
    "image name too long": ("D103", record(image="x" * 5000)),
    "image name with nul": ("D103", record(image="a\0.png")),
    "image name with lone surrogate": ("D103", record(image="\ud800.png")),
    "image of 0 bytes": ("D104", record(image="empty.jpg")),
    "image that is a page": ("D104", record(image="page.jpg")),
    "image cut in its header": ("D104", record(image="cut.png")),
    "image too large": ("D105", record(image="bomb.png")),
    "image too narrow": ("D106", record(image="narrow.png")),
    "image without mark": ("D107", record("What?")),
    "more marks than images": ("D107", record("<image> and <image>")),
    "more images than marks": ("D107", record(image=["a.png", "b.png"])),
    "mark without image": ("D108", record(image=None)),
    "answer empty": ("D110", record(answer="")),
    "answer only spaces": ("D110", record(answer=" \n\t")),
    "image outside": ("D120", record(image="../secret.png")),
    "image absolute": ("D120", record(image="/etc/passwd")),
    "image a link outside": ("D120", record(image="link.png")),
    "image a url": ("D120", record(image="http://169.254.169.254/a.png")),
    "image a windows path": ("D120", record(image="C:\\a.png")),
}  # fmt: skip
