"""SimCLR on two augmented views of each image: VICRegL's large views with a custom loss.

    python examples/simclr.py SHARDS --model resnet18 --steps 100

SHARDS: a folder of WebDataset tars; labels are not needed.
"""

import argparse
from itertools import islice

import timm
import torch
import torch.nn.functional as F

from pipeline import Loader, recipes


def contrastive_loss(a: torch.Tensor, b: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """NT-Xent loss of two views' embeddings (B, D): the other view is the positive, all other images are negatives."""
    x = F.normalize(torch.cat([a, b]), dim=1)
    logits = (x @ x.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(x), device=x.device).roll(len(a)))


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = recipes.vicregl(small=0, size=args.size, large_scale=(0.08, 1.0), gamma=None)
    loader = Loader(args.shards, recipe, args.batch_size, device=device)
    model = timm.create_model(args.model, num_classes=128).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, batch in enumerate(islice(loader.forever(), args.steps)):
        views = batch.views["large"].tensor(recipe.mean, recipe.std)  # (B, 2, 3, S, S)
        loss = contrastive_loss(model(views[:, 0]), model(views[:, 1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    loader.close()
    return loss.item()


if __name__ == "__main__":
    main()
