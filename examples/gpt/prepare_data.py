"""Turn text files into what Megatron trains on: a SentencePiece tokenizer and a .bin/.idx token file.

    python examples/gpt/prepare_data.py --output examples/gpt/data/stdlib
    python examples/gpt/prepare_data.py --output data/mine --input notes/ book.txt --vocab-size 8192

writes PREFIX.model, PREFIX.bin and PREFIX.idx; train on them with

    --data-path PREFIX --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model PREFIX.model

Without --input the corpus is the source of this interpreter's own standard library: about 9 MB of real text
that every machine has. One file is one document. The same files give the same bytes: files are taken in the
order of their names, then shuffled by --seed, so that Megatron's --split, which cuts by position, gives
training and validation documents of the same kind.

SentencePiece, because Megatron reads its model offline with two flags and no further package. The tokenizer
keeps every character, runs of spaces included, and falls back to bytes for rare ones: decoding restores the
text exactly.
"""

import argparse
import io
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

NOT_PROSE = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages"),  # not the library itself
    *("encodings", "pydoc_data", "lib2to3", "turtledemo", "__phello__"),  # tables, generated, dead code
}
"""Folders of the standard library that are left out of the default corpus."""

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
EOD = "<eod>"


class DataError(Exception):
    """Something that the user can put right; its text says how."""


def standard_library() -> list[Path]:
    """The Python sources of the running interpreter's standard library, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if NOT_PROSE.isdisjoint(path.parts[:-1])]


def text_files(inputs: Sequence[Path]) -> list[Path]:
    """Files as given, and the text files under the folders given, each once, in the order of their names."""
    found: set[Path] = set()
    for path in inputs:
        if path.is_file():
            found.add(path)
        elif path.is_dir():
            found.update(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        else:
            raise DataError(f"--input {path}: no such file or folder")
    if not found:
        names = ", ".join(map(str, inputs))
        suffixes = "/".join(TEXT_SUFFIXES)
        raise DataError(f"--input {names}: no {suffixes} file there; name files of other kinds one by one")
    return sorted(found)


def read_documents(files: Sequence[Path], seed: int) -> list[str]:
    """The non-empty files' text, shuffled by `seed`."""
    documents = []
    for path in files:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        if text.strip():
            documents.append(text)
    if not documents:
        raise DataError(f"all {len(files)} input files are empty")
    random.Random(seed).shuffle(documents)
    return documents


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> bytes:
    """A byte-pair SentencePiece model of exactly `vocab_size` pieces that loses no character."""

    def lines() -> Iterator[str]:
        for text in documents:
            yield from text.splitlines(keepends=True)

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            num_threads=1,  # the same model everywhere
            minloglevel=2,
            # keep the text as it is: source code lives by its spaces
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            max_sentence_length=1 << 20,  # bytes in a line; longer ones are not learned from
            # <pad> apart from <eod>: Megatron masks the loss on padding
            pad_id=0,
            unk_id=1,
            eos_id=2,
            bos_id=-1,
            eos_piece=EOD,
        )
    except RuntimeError as error:
        size, reason = sum(map(len, documents)), str(error).rpartition("] ")[2]
        raise DataError(f"--vocab-size {vocab_size} does not suit a corpus of {size:,} characters: {reason}") from None
    return model.getvalue()


def write_dataset(prefix: Path, documents: Sequence[str], model: bytes) -> int:
    """Write PREFIX.bin and .idx, each document ended by <eod>; returns the number of tokens."""
    from megatron.core.datasets.indexed_dataset import (
        IndexedDatasetBuilder,
    )  # takes seconds: errors come first

    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = tokenizer.get_piece_size()
    # Megatron infers the type from the vocabulary where it preloads indices: choose as it does.
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16 if size <= 1 << 16 else np.int32)
    tokens = 0
    for text in documents:
        ids = [*tokenizer.encode(text), tokenizer.eos_id()]
        builder.add_document(ids, [len(ids)])
        tokens += len(ids)
    builder.finalize(f"{prefix}.idx")
    return tokens


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="where to write")
    parser.add_argument("--input", type=Path, nargs="+", metavar="PATH", help="text files or folders")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="for the order (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> str:
    """Do what the command line says; returns a line that sums it up."""
    prefix: Path = args.output
    outputs = [Path(f"{prefix}{suffix}") for suffix in (".model", ".bin", ".idx")]
    existing = [str(path) for path in outputs if path.exists()]
    if existing and not args.overwrite:
        raise DataError(f"{', '.join(existing)} exists; give --overwrite to replace it")
    files = text_files(args.input) if args.input else standard_library()
    documents = read_documents(files, args.seed)
    model = train_tokenizer(documents, args.vocab_size)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = write_dataset(prefix, documents, model)
    outputs[0].write_bytes(model)  # last: it is there only if all of it is
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    return (
        f"{prefix}: {len(documents)} documents, {megabytes:.1f} MB, {tokens:,} tokens, "
        f"{megabytes * 1e6 / tokens:.2f} bytes a token, vocabulary {args.vocab_size}"
    )


if __name__ == "__main__":
    try:
        print(prepare(parse_args()))
    except DataError as error:
        sys.exit(f"prepare_data.py: {error}")
