"""Texts that Python and its packages ship, and a tokenizer of them, to train a model without a download.

Text A is Python sources and licences. Text B is documentation: .rst, .md and .txt files, and the docstrings
of every eighth source, which text A then does not have. A text is cut into pieces of some 3,000 characters,
at the ends of lines. A piece that occurs a second time is left out, also if it occurs in another text.

Files come in the order of a checksum of their paths, so a limited text is a sample of all packages, and the
same machine gives the same texts.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import site
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from files.atomic_writes import stage_files
from options.errors import UserError

TEXT_A, TEXT_B, HELD_OUT = "text_a.jsonl", "text_b.jsonl", "held_out.jsonl"  # HELD_OUT: of text B
PIECE_CHARACTERS = 3000
FILE_BYTES = 2**19  # larger files are mostly tables
DOCSTRING_SHARE = 8  # one source in so many gives its docstrings to text B
LEAST_LETTERS = 0.5  # share of a documentation file's characters; below it, the file is data
LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
DOCUMENTATION = (".rst", ".md", ".txt")
TOKENIZER_PIECES = 8000  # of text A, which the tokenizer learns from
BOS, EOS = "<s>", "</s>"


def find_roots() -> list[Path]:
    """Return the folders of the standard library and of the installed packages."""
    folders = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return sorted({Path(f).resolve() for f in [*folders, *site.getsitepackages()] if Path(f).is_dir()})


def list_files(roots: list[Path]) -> list[tuple[int, Path]]:
    """Return (checksum of the path below its root, path) of each file that may give text, in order."""
    found: dict[Path, tuple[int, str]] = {}
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                if path.suffix in (".py", *DOCUMENTATION) or name.startswith(LICENCES):
                    relative = path.relative_to(root).as_posix()
                    found.setdefault(path, (zlib.crc32(relative.encode()), relative))
    return [(found[path][0], path) for path in sorted(found, key=lambda path: (found[path], path))]


def read_text(path: Path) -> str:
    """Return a file's text, or "" if it is too large or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= FILE_BYTES else ""
    except (OSError, UnicodeDecodeError):
        return ""


def extract_docstrings(source: str) -> str:
    """Return the docstrings of a module, its classes and its functions; "" if it is not this Python's."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that future versions refuse
            tree = ast.parse(source)
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
    except (SyntaxError, ValueError, RecursionError):
        return ""


def gives_docstrings(checksum: int, path: Path) -> bool:
    """Return whether text B has the docstrings of this source, instead of text A the source."""
    return path.suffix == ".py" and checksum % DOCSTRING_SHARE == 0


def read_text_a(files: list[tuple[int, Path]]) -> Iterator[str]:
    """Yield Python sources and licences."""
    for checksum, path in files:
        is_source = path.suffix == ".py" and not gives_docstrings(checksum, path)
        if is_source or path.name.startswith(LICENCES):
            yield read_text(path)


def read_text_b(files: list[tuple[int, Path]]) -> Iterator[str]:
    """Yield documentation, and the docstrings of a module as one text."""
    for checksum, path in files:
        if gives_docstrings(checksum, path):
            yield extract_docstrings(read_text(path))
        elif path.suffix in DOCUMENTATION and not path.name.startswith(LICENCES):
            text = read_text(path)
            if sum(map(str.isalpha, text)) >= LEAST_LETTERS * len(text):
                yield text


def cut_pieces(text: str) -> Iterator[str]:
    """Yield parts of a text of up to PIECE_CHARACTERS, unless a single line is longer."""
    lines: list[str] = []
    characters = 0
    for line in text.splitlines(keepends=True):
        if lines and characters + len(line) > PIECE_CHARACTERS:
            yield "".join(lines)
            lines, characters = [], 0
        lines.append(line)
        characters += len(line)
    yield "".join(lines)


def write_rows(path: Path, texts: Iterator[str], limit: int, seen: set[bytes]) -> int:
    """Write the pieces of texts as rows of `text`; return the number of characters.

    Args:
        path: the .jsonl file.
        texts: taken until the limit is reached, each to its end.
        limit: characters.
        seen: digests of pieces that are left out; those of the written pieces are added.

    Raises UserError if there is no text.
    """
    characters = 0
    with stage_files(path.parent) as stage, stage(path.name).open("w", encoding="utf-8") as file:
        for text in texts:
            for piece in cut_pieces(text):
                digest = hashlib.blake2b(piece.strip().encode(), digest_size=16).digest()
                if piece.strip() and digest not in seen:
                    seen.add(digest)
                    file.write(json.dumps({"text": piece}) + "\n")
                    characters += len(piece)
            if characters >= limit:
                break
        if not characters:
            raise UserError(f"{path.name}: the installed packages have no such text")
    return characters


def write_texts(folder: Path, roots: list[Path], limits: dict[str, int]) -> dict[str, int]:
    """Write the three texts into `folder`; return the characters of each. limits: {file name: characters}."""
    files, seen = list_files(roots), set[bytes]()
    text_b = read_text_b(files)
    # The rows of one file are all held out, or none is.
    sources = {HELD_OUT: text_b, TEXT_B: text_b, TEXT_A: read_text_a(files)}
    return {name: write_rows(folder / name, texts, limits[name], seen) for name, texts in sources.items()}


def read_rows(path: Path, count: int) -> Iterable[str]:
    """Return the texts of the first `count` rows."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in islice(file, count)]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with BOS (0) and EOS (1). vocabulary: most tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
