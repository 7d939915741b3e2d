"""What the downstream classifiers get from real pictures, beside published figures: are they who they say they are?

    python benchmarks/downstream_classifiers.py --data mnist.npz
    python benchmarks/downstream_classifiers.py --data fashion_mnist.npz --passes 15

Trains on x_train and tests on x_test. Published: 0.9922 on MNIST for this very CNN, 15 passes over 54,000 pictures
(https://keras.io/examples/vision/mnist_convnet/); on Fashion-MNIST 0.876 to 0.925 for CNNs of two convolutions (the
table in https://github.com/zalandoresearch/fashion-mnist).
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from shared.metrics import downstream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--count", type=int, default=60_000, help="real pictures to train on")
    parser.add_argument("--passes", type=int, default=downstream.EPOCHS, help="of the CNN over them")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of the CNN and the MLP")
    arguments = parser.parse_args()
    downstream.EPOCHS = arguments.passes
    with np.load(arguments.data, allow_pickle=False) as data:
        images, labels = data["x_train"][: arguments.count, ..., None], data["y_train"][: arguments.count]
        test, wanted = data["x_test"][..., None], data["y_test"]
    for name, (classifier, varies) in downstream.CLASSIFIERS.items():
        began = time.monotonic()
        found = [
            float((classifier(images, {"class": labels.astype(np.int64)}, test, seed)["class"] == wanted).mean())
            for seed in range(arguments.seeds if varies else 1)
        ]
        shown = ", ".join(f"{accuracy:.4f}" for accuracy in found)
        print(f"{name:<20} {len(images):,} real pictures: {shown}   {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
