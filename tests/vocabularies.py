"""Small tokenizers for tests: SmolLM2's, cut down to what its recorded texts need, as GGUF and as tokenizer.json."""

import json
from pathlib import Path

import gguf

RECORDED = json.loads(Path(__file__).with_name("smollm2.json").read_text("utf-8"))
TOKENS = [RECORDED["tokens"].get(str(i), f"<unused {i}>") for i in range(RECORDED["vocab_size"])]
TEXTS = {one["text"]: one["ids"] for one in RECORDED["texts"]}
TYPES = [3 if i in RECORDED["control"] else 1 for i in range(len(TOKENS))]


def write_gguf(path: Path, *, tokens=TOKENS, merges=RECORDED["merges"], pre="smollm", model="gpt2", eos=2) -> Path:
    """A GGUF file with nothing in it but a tokenizer."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(TYPES[: len(tokens)])
    writer.add_token_merges(merges)
    if eos is not None:
        writer.add_eos_token_id(eos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_small(folder: Path) -> Path:
    """A tokenizer.json of bytes and 200 merges, with <|endoftext|>; returns its folder."""
    from lensjax.runs.data.tokenizers import byte_level
    from tests.reference.byte_pairs import byte_names

    names = list(byte_names().values())
    merges = [merge for merge in RECORDED["merges"] if set(merge) - {" "} <= set(names)][:200]
    tokens = ["<|endoftext|>", *dict.fromkeys([*names, *(merge.replace(" ", "") for merge in merges)])]
    known = set(tokens)
    merges = [merge for merge in merges if set(merge.split(" ")) <= known]
    inner = byte_level(tokens, merges, pre="smollm", types=[3] + [1] * (len(tokens) - 1))
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    return folder
