"""A run's checkpoint -> a model directory that the server loads.

    python -m weights.training.export --run RUN_DIR --corpus DIR --model MODEL_DIR

Writes config.json and model.safetensors (bfloat16), then training.png and the card README.md with
held-out measurements and samples: of the default model, whose recipe is weights/default.toml.
--weights-only stops after the first two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from engine.config import ModelConfig
from engine.model.loader import load_model
from weights.baselines import measure
from weights.corpus.sources import SOURCES, read_documents
from weights.training.card import Facts, draw_samples, write_card
from weights.training.curve import draw, read_log
from weights.training.evaluate import evaluate
from weights.training.recipe import TrainingConfig
from weights.whole import write_whole

RECIPE = Path(__file__).parents[1] / "default.toml"


def export_weights(checkpoint: dict[str, Any], model_dir: Path) -> ModelConfig:
    """Write config.json and model.safetensors; a tied head is stored once."""
    config = ModelConfig.from_dict(checkpoint["config"])
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in checkpoint["model"].items()
        if not (config.tie_embeddings and name == "head.weight")
    }
    model_dir.mkdir(parents=True, exist_ok=True)
    # Not save_file(): that leaves a file which only its owner can read.
    content = save(tensors, metadata={"format": "pt"})
    write_whole(model_dir / "model.safetensors", content)
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    write_whole(model_dir / "config.json", text.encode())
    return config


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of text of each source in a split."""
    names = [source.name for source in SOURCES if (folder / f"{source.name}.jsonl").exists()]
    documents = {name: read_documents(folder / f"{name}.jsonl") for name in names}
    return {name: sum(len(text.encode()) for text in texts) for name, texts in documents.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m weights.training.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--run", type=Path, required=True, help="run directory of a training")
    parser.add_argument("--corpus", type=Path, required=True, help="what weights.corpus wrote")
    parser.add_argument("--model", type=Path, required=True, help="model directory to write into")
    parser.add_argument("--weights-only", action="store_true", help="no card, no picture")
    options = parser.parse_args()
    checkpoint = torch.load(options.run / "ckpt.pt", map_location="cpu", weights_only=True)
    config = export_weights(checkpoint, options.model)
    print(f"step {checkpoint['step']:,}: {options.model / 'model.safetensors'}")
    if options.weights_only:
        return
    draw(read_log(options.run / "log.jsonl"), options.model / "training.png")
    model = load_model(options.model, torch.float32)
    facts = Facts(
        config=config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=checkpoint["tokens"],
        steps=checkpoint["step"],
        busy_hours=checkpoint["busy"] / 3600,
        threads=torch.get_num_threads(),
        mixture=TrainingConfig.read(RECIPE).weights,
        train_bytes=sizes(options.corpus / "train"),
        held_out_bytes=sizes(options.corpus / "heldout"),
        held_out=evaluate(options.model, options.corpus),
        baselines=measure(options.corpus, options.model),
    )
    card = write_card(facts, draw_samples(options.model))
    (options.model / "README.md").write_text(card, encoding="utf-8")
    print(f"card: {options.model / 'README.md'}")


if __name__ == "__main__":
    main()
