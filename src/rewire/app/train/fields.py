"""The options of `rewire train`: each is declared once, as a field of `TrainConfig`.

The command line, the checks, `config.json` and the report are made from these fields.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from rewire.app import run_files
from rewire.app.train.option import (
    DATA,
    METHOD,
    NETWORK,
    RUN,
    TRAINING,
    BelowOne,
    Block,
    Folder,
    Positive,
    Share,
    Shares,
    Size,
    Sizes,
    Source,
    Words,
    option_field,
)
from rewire.schedules import RATES

__all__ = ["MethodOption", "TrainConfig"]

MethodOption = bool | int | float | str | list[int | float] | dict[str, int | float] | None


class TrainConfig(BaseModel):
    """The options of `rewire train`; written to `config.json` and read back by `--resume`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Source = option_field(
        "digits",
        DATA,
        "SOURCE",
        "A name that 'rewire data' lists, a file, a folder of images, sklearn:NAME, or "
        "path.to.module:function.",
    )
    data_dir: Folder | None = option_field(
        None, DATA, "FOLDER", "Has the files of a data set, or a subfolder named as the data set."
    )
    mirror: str | None = option_field(
        None, DATA, "URL", "The folder to download from, where --data-dir is not given."
    )
    target: str | None = option_field(
        None,
        DATA,
        "COLUMNS",
        "The column (or the array) that is to be found; several of a regression with commas.",
        shown="one called target, label, class or y",
    )
    task: Literal["auto", "classification", "regression"] = option_field(
        "auto", DATA, "KIND", "classification, regression, or auto: what the target looks like."
    )
    validation: BelowOne = option_field(
        0.1, DATA, "SHARE", "Share of the training samples that is held out to report on."
    )
    validation_data: Source | None = option_field(
        None, DATA, "FILE", "Samples to report on while training, instead of a share."
    )
    test_share: BelowOne = option_field(
        0.2, DATA, "SHARE", "Share of the samples of a file that is the test set."
    )
    test_data: Source | None = option_field(
        None, DATA, "FILE", "The test set, instead of a share of --data."
    )
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = option_field(
        0, DATA, "NUMBER", "Decides which samples of a file are the test set, for every --seed."
    )
    standardise: bool | None = option_field(
        None,
        DATA,
        "",
        "Inputs with mean 0 and variance 1, as the training samples have them.",
        "--standardise/--no-standardise",
        shown="what suits the data",
    )
    augment: Words | None = option_field(
        None,
        DATA,
        "KINDS",
        "How training images are changed at random: crop, flip, both with a comma, or none.",
        shown="what suits the data",
    )
    image_size: Annotated[int, Field(gt=0, le=4096)] | None = option_field(
        None, DATA, "PIXELS", "Resize the images of a folder to so many pixels a side."
    )

    model: str = option_field(
        "mlp",
        NETWORK,
        "NAME",
        "mlp:300,100, lenet5, cifar-cnn, wrn-22-2, resnet18, lstm:200, gpt:4x256, or "
        "path.to.module:callable.",
    )
    hidden: Sizes = option_field(
        (300, 100),
        NETWORK,
        "SIZES",
        "Units of the hidden layers of mlp; none makes a linear model.",
        allowed="sizes from 1 to 2^40 - 1 such as 300,100, or none",
    )
    bias: bool = option_field(True, NETWORK, "", "Layers of mlp with biases.", "--bias/--no-bias")
    only: Words | None = option_field(
        None,
        NETWORK,
        "PATTERNS",
        "Names of the layers that the budget is for, such as 'blocks.*'; others stay dense.",
        shown="all that can be sparse",
    )
    exclude: Words | None = option_field(
        None, NETWORK, "PATTERNS", "Names of layers that stay dense, such as 'head'."
    )
    density: Shares | None = option_field(
        None,
        NETWORK,
        "SHARES",
        "Share of the possible connections that is allowed: one number, or one for each layer.",
        shown="0.1",
        allowed="a number greater than 0 and at most 1, or one for each layer: 0.01,0.03,0.3",
    )
    connections: Size | None = option_field(
        None, NETWORK, "NUMBER", "Allowed connections of the network, instead of --density."
    )
    distribution: str | None = option_field(
        None, NETWORK, "NAME", "How layers share one budget: erk, er or uniform.", shown="erk"
    )
    start_density: Share | None = option_field(
        None,
        NETWORK,
        "SHARE",
        "Density at the start, for methods that begin above their budget.",
        shown="1 for most of them",
    )
    fan_in: Size | None = option_field(
        None, NETWORK, "NUMBER", "Most connections of one output of a layer."
    )
    fan_out: Size | None = option_field(
        None, NETWORK, "NUMBER", "Most connections of one input of a layer."
    )
    block: Block | None = option_field(
        None,
        NETWORK,
        "NUMBERS",
        "64,32,99: at most 99 connections in each block of 64 outputs x 32 inputs.",
        allowed="three whole numbers greater than 0 (outputs, inputs, connections): 64,32,99",
    )
    init: Literal["auto", "dense", "sparse"] = option_field(
        "auto",
        NETWORK,
        "RULE",
        "First values: auto keeps the strength of a dense network's signals; or dense, sparse.",
    )

    method: str = option_field(
        "deep-r", METHOD, "NAME", "One of those that 'rewire methods' lists."
    )
    method_options: dict[str, MethodOption] = option_field(
        {}, METHOD, "NAME=VALUE", "A parameter of the method; may be repeated.", "--set"
    )

    epochs: Size = option_field(20, TRAINING, "NUMBER", "Passes over the training data.")
    batch_size: Size = option_field(16, TRAINING, "NUMBER", "Samples in a step.")
    optimizer: str = option_field(
        "adam",
        TRAINING,
        "NAME",
        f"One of {', '.join(RATES)}.",
        shown="the one that suits the method, mostly adam",
    )
    lr: Positive | None = option_field(
        None,
        TRAINING,
        "NUMBER",
        "Learning rate.",
        shown="what suits method and optimizer, mostly 0.01",
    )
    schedule: Literal["cosine", "step", "exponential", "constant"] = option_field(
        "cosine",
        TRAINING,
        "NAME",
        "Of the learning rate: cosine (half of one, down to 0), step, exponential, constant.",
        shown="cosine, with --lr-decay exponential",
    )
    lr_decay: Positive | None = option_field(
        None,
        TRAINING,
        "FACTOR",
        "Multiplies the learning rate at each milestone (step) or after every epoch.",
        shown="0.1 for step",
    )
    milestones: Annotated[Sizes, Field(min_length=1)] | None = option_field(
        None,
        TRAINING,
        "EPOCHS",
        "After how many epochs the schedule step lowers the rate, such as 80,120.",
        shown="half and three quarters of the run",
        allowed="whole numbers greater than 0 such as 80,120",
    )
    warmup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = option_field(
        0.0, TRAINING, "EPOCHS", "In which the learning rate rises from 0, before the schedule."
    )
    clip: Positive | None = option_field(
        None,
        TRAINING,
        "NORM",
        "The largest norm of all gradients together; longer ones are shortened.",
        shown="no limit",
    )
    precision: Literal["float32", "bfloat16", "float16"] = option_field(
        "float32",
        TRAINING,
        "DTYPE",
        "Of products while training: float32, or bfloat16 or float16 in mixed precision.",
    )
    momentum: BelowOne = option_field(0.0, TRAINING, "NUMBER", "Of sgd and rmsprop.")
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = option_field(
        0.0, TRAINING, "NUMBER", "Of weights, not of biases and norms; some methods refuse it."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = option_field(
        0, TRAINING, "NUMBER", "Decides all random numbers."
    )

    checkpoint_every: Annotated[int, Field(ge=0)] = option_field(
        0, RUN, "STEPS", "Save within epochs too; 0 saves only at their ends."
    )
    threads: Annotated[int, Field(gt=0, le=1024)] | None = option_field(
        None, RUN, "NUMBER", "CPU threads.", shown="one for small networks, else all cores"
    )

    def to_json(self) -> str:
        """The text of `config.json`."""
        return json.dumps(self.model_dump(), indent=2) + "\n"

    def sha256(self) -> str:
        """Checksum over all that decides the numbers of the run."""
        return run_files.config_sum(self.model_dump())
