"""Train the classifier: python -m training.train DATA_DIR... --out best_model.pth

DATA_DIR holds `meme/` and `not_meme/`; each of their sub-folders is one source, named `GROUP__SOURCE` or in any other
way. A teacher with ImageNet weights is fine-tuned on the pictures. Then DenseNet121 learns in several legs from the
labels, from that teacher and from itself as it was before the leg; between legs its weights are averaged with those
that the leg started from. The state is saved every two minutes; an interrupted run continues with --resume.
"""

import argparse
import copy
import math
import pickle
import random
import sys
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from engine import OPENVINO, best_engine, compile_network
from evaluation.dataset import LabelledPicture, read_folder, unseen_sources
from evaluation.metrics import share
from images import find_pictures
from model import (
    CLASSES,
    DEFAULT_CHECKPOINT,
    Classifier,
    Preprocessing,
    build_network,
    for_inference,
    save_checkpoint,
)
from training.calibrate import add_bias, calibrate
from training.distillation import Progress, TrainingConfig, average_weights, fingerprint, train
from training.stream import group_names
from training.teacher import INPUT_SIZE as TEACHER_INPUT_SIZE
from training.teacher import DistillationStudent, Teacher

INPUT_SIZE = 160  # pixels, of the finished classifier
# Longer, it gets worse on new sources. Its depthwise convolutions are slower in bfloat16 without a matrix unit.
TEACHER = TrainingConfig(TEACHER_INPUT_SIZE, 19_200, 3e-4, 0.99, 0.3, bfloat16=False)
STUDENT = TrainingConfig(INPUT_SIZE, 25_600, 6e-4, 0.995, 0, bfloat16=True)
LEGS = 3
HELD_OUT = 0.1  # share of the pictures, where no validation folder is given
SEED = 0


def finetune_teacher(
    outputs: int, pictures: list[LabelledPicture], held_out: list[LabelledPicture], out: Path, *, resume: bool
) -> tuple[Teacher, list[Progress]]:
    """Fine-tune the teacher on the labels; its state lies beside `out`."""
    torch.manual_seed(SEED)
    state = out.with_suffix(".teacher.resume.pth")
    return train(Teacher(outputs), TEACHER, pictures, held_out, state, resume=resume, seed=SEED)


def build_student(outputs: int, init: Path | None) -> DistillationStudent:
    """The network to train, with the weights of a file if one is given.

    Args:
        outputs: classes and groups.
        init: a checkpoint, or a state dict of DenseNet121 whose classifier may be missing or of another size.

    Raises:
        SystemExit: if the file does not hold DenseNet121's weights.
    """
    torch.manual_seed(SEED)
    student = DistillationStudent(outputs)
    if not init:
        return student
    try:
        weights = torch.load(init, map_location="cpu", weights_only=True)
        weights = weights.get("state_dict", weights)
        weights = {name.removeprefix("module."): tensor.float() for name, tensor in weights.items()}
        features = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}
        missing, unexpected = student.network.load_state_dict(features, strict=False)
    except (OSError, EOFError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
        raise SystemExit(f"{init} cannot be read as DenseNet121's weights: {error}") from error
    if unexpected or any(not name.startswith("classifier.") for name in missing):
        raise SystemExit(f"{init} does not hold DenseNet121's weights.")
    with torch.no_grad():
        for name, parameter in student.network.get_submodule("classifier").named_parameters():
            known = weights.get(f"classifier.{name}")
            if known is not None and len(known) == len(CLASSES):
                parameter[: len(CLASSES)] = known
    return student


def distil(
    student: DistillationStudent,
    teacher: nn.Module,
    pictures: list[LabelledPicture],
    held_out: list[LabelledPicture],
    out: Path,
    *,
    unlabelled: list[Path],
    resume: bool,
) -> tuple[nn.Module, dict[str, list[Progress]]]:
    """Train the student in `LEGS` legs; each but the first starts from the mean of the last one's start and end.

    The mean keeps what was known before.

    Args:
        student: from `build_student`.
        teacher: fine-tuned.
        pictures: what to train on.
        held_out: what to validate on.
        out: beside it lie the states of the legs.
        unlabelled: see `TrainingStream`.
        resume: continue from these states.

    Returns:
        DenseNet121 with the outputs of the classes, on the CPU, and the history of each leg.
    """
    histories = {}
    ready = (for_teaching(teacher, TEACHER_INPUT_SIZE), TEACHER_INPUT_SIZE)
    for leg in range(LEGS):
        itself = (for_teaching(drop_group_outputs(student.network), INPUT_SIZE), INPUT_SIZE)
        trained, histories[f"leg {leg + 1}"] = train(
            copy.deepcopy(student),
            STUDENT,
            pictures,
            held_out,
            out.with_suffix(f".leg-{leg}.resume.pth"),
            resume=resume,
            teachers=[ready, itself],
            unlabelled=unlabelled,
            seed=leg,
        )
        if leg < LEGS - 1:
            average_weights([trained.network, student.network])
        student = trained.requires_grad_(True)
    return drop_group_outputs(student.network), histories


def for_teaching(network: nn.Module, input_size: int) -> nn.Module:
    """The network where it answers fastest: on the GPU, else compiled if OpenVINO is installed."""
    if torch.cuda.is_available():
        return network.cuda()
    return compile_network(network, input_size) if best_engine() == OPENVINO else network.eval()


def drop_group_outputs(network: nn.Module) -> nn.Module:
    """A copy of DenseNet121 with the outputs of the classes only, frozen, on the CPU."""
    state = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    kept = {name: tensor[: len(CLASSES)] for name, tensor in state.items() if name.startswith("classifier.")}
    smaller = build_network()
    smaller.load_state_dict(state | kept)
    return smaller.eval().requires_grad_(False)


def centre_classifier(network: nn.Module) -> None:
    """Subtract from the last layer what both classes share; no probability changes.

    The softmax depends on the classes' difference only. Afterwards each logit is evidence for its class against the
    other, and so is its heatmap.
    """
    for weights in network.get_submodule("classifier").parameters():
        weights.sub_(weights.mean(0, keepdim=True))


def plot_history(path: Path, histories: dict[str, list[Progress]]) -> None:
    """Plot the student's loss, and its accuracy and AUROC in validation, over all draws of its legs.

    Args:
        path: of the picture.
        histories: by name, the teacher's first, whose end is a dashed line.
    """
    (_, teacher), *legs = histories.items()
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, auroc = figure.subplots(1, 3)
    start = 0
    for number, (name, history) in enumerate(legs):
        draws = [start + entry.pictures for entry in history]
        style = {"marker": "o", "color": f"C{number}", "label": name}
        loss.plot(draws, [entry.loss for entry in history], **style)
        accuracy.plot(draws, [100 * entry.validation_accuracy for entry in history], **style)
        auroc.plot(draws, [entry.validation_auroc for entry in history], **style)
        start = draws[-1]
    accuracy.axhline(100 * teacher[-1].validation_accuracy, color="grey", linestyle="--", label="teacher")
    auroc.axhline(teacher[-1].validation_auroc, color="grey", linestyle="--", label="teacher")
    loss.set(title="Training loss", ylabel="weighted sum of losses")
    accuracy.set(title="Validation accuracy at even odds", ylabel="%, mean over sources")
    auroc.set(title="Validation AUROC", ylabel="mean over pairs of sources")
    for ax in (loss, accuracy, auroc):
        ax.set(xlabel="draws", xlim=(0, None))
        ax.grid(alpha=0.3)
    auroc.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def hold_out(pictures: list[LabelledPicture]) -> tuple[list[LabelledPicture], list[LabelledPicture]]:
    """Set whole sources aside, so that calibration sees unknown ones: at most twice `HELD_OUT` of each class.

    The last source of a group stays.
    Where every source of a class is larger than that, single pictures of it are set aside.
    """
    aside: list[LabelledPicture] = []
    for label in CLASSES:
        of_label = [picture for picture in pictures if picture.label == label]
        sources = sorted({picture.source for picture in of_label})
        random.Random(SEED).shuffle(sources)
        taken: list[LabelledPicture] = []
        left = Counter(picture.group for picture in of_label)
        for source in sources:
            of_source = [picture for picture in of_label if picture.source == source]
            groups = Counter(picture.group for picture in of_source)
            if any(left[group] == count for group, count in groups.items()):
                continue  # training would not see such pictures at all
            if len(taken) < HELD_OUT * len(of_label) and len(taken + of_source) <= 2 * HELD_OUT * len(of_label):
                taken += of_source
                left -= groups
        aside += taken or random.Random(SEED).sample(of_label, math.ceil(HELD_OUT * len(of_label)))
    chosen = {picture.path for picture in aside}
    return [picture for picture in pictures if picture.path not in chosen], aside


def main() -> int:
    """Read the command line, train, calibrate, write; 0 when done, 1 if files do not fit, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train the classifier.")
    parser.add_argument("data", type=Path, nargs="+", metavar="DATA_DIR", help="folder with meme/ and not_meme/")
    parser.add_argument("--out", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--init", type=Path, metavar="FILE", help="checkpoint or state dict to start from")
    parser.add_argument("--val", type=Path, metavar="DIR", help="pictures to validate on; by default some of DATA_DIR")
    parser.add_argument(
        "--unlabelled", type=Path, nargs="+", metavar="DIR", default=[], help="more pictures, which teachers label"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("outputs/training.png"))
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    arguments = parser.parse_args()

    pictures = [picture for folder in arguments.data for picture in read_folder(folder)]
    held_out = read_folder(arguments.val) if arguments.val else pictures
    for folder, found in ((arguments.data[0], pictures), (arguments.val, held_out)):
        if {picture.label for picture in found} != set(CLASSES):
            parser.error(f"there must be pictures in both {folder}/meme and {folder}/not_meme")
    if not arguments.val:
        pictures, held_out = hold_out(pictures)
    held_out = unseen_sources(held_out, pictures)
    unlabelled = [path for folder in arguments.unlabelled for path in find_pictures(folder)]

    outputs = len(CLASSES) + len(group_names(pictures))
    student = build_student(outputs, arguments.init)
    teacher, teacher_history = finetune_teacher(outputs, pictures, held_out, arguments.out, resume=arguments.resume)
    network, histories = distil(
        student, teacher, pictures, held_out, arguments.out, unlabelled=unlabelled, resume=arguments.resume
    )
    histories = {"teacher": teacher_history} | histories
    centre_classifier(network)
    network.half().float()  # as it will be saved
    preprocessing = Preprocessing(INPUT_SIZE)
    calibration, shift, probability, is_meme = calibrate(for_inference(network), preprocessing, held_out)
    network.load_state_dict(add_bias(network.state_dict(), shift))
    accuracy = share((probability >= calibration.threshold) == is_meme)
    save_checkpoint(
        arguments.out,
        network,
        preprocessing,
        **asdict(calibration),
        about={
            "created": datetime.now(UTC).date().isoformat(),
            "trained_on": dict(Counter(picture.label for picture in pictures)),
            "unlabelled": len(unlabelled),
            "data_sha256": fingerprint(pictures),
            "teacher": asdict(TEACHER),
            "student": asdict(STUDENT),
            "histories": {name: [asdict(entry) for entry in history] for name, history in histories.items()},
            "validation_accuracy": asdict(accuracy),
        },
    )
    plot_history(arguments.plot, histories)
    print(f"{arguments.out}: {accuracy.value:.1%} of {len(is_meme)} validation pictures right")
    print(f"SHA-256 {Classifier.load(arguments.out).sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
