"""Supervised training of a timm model on random resized crops: the data loader in your own training loop.

    python examples/supervised.py SHARDS --model resnet18 --steps 100

SHARDS: a folder of labelled WebDataset tars, as written by tools/shard_imagenet.py. Prints loss and accuracy every 10
steps.
"""

import argparse
from itertools import islice

import timm
import torch
import torch.nn.functional as F

from pipeline import Loader, ShardSet, recipes


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards = ShardSet(args.shards)
    loader = Loader(shards, recipes.plain(size=args.size), args.batch_size, device=device)
    model = timm.create_model(args.model, num_classes=int(shards.table["label"].max()) + 1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, batch in enumerate(islice(loader.forever(), args.steps)):
        logits = model(batch.views["image"].tensor()[:, 0])  # (B, 3, S, S): one view per image
        loss = F.cross_entropy(logits, batch.label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            accuracy = (logits.argmax(1) == batch.label).float().mean().item()
            print(f"step {step}: loss {loss.item():.3f}, accuracy {accuracy:.1%}", flush=True)
    loader.close()
    return loss.item()


if __name__ == "__main__":
    main()
