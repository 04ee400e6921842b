"""Knowledge distillation in one file to read: teacher, student, and the same student taught by the teacher.

    python benchmarks/reference.py                   # downloads CIFAR-10 and ImageNet weights; days without a GPU
    python benchmarks/reference.py --as-published

This is the experiment of github.com/ghnmqdtg/Teacher-Student-Model-From-Scratch (2023) on CIFAR-10 at 224 px. The
teacher is a ResNet50, the student a ResNet18, and both start from ImageNet weights. That repository reports 95.4% for
the teacher, 94.1% for the student and 94.2% for the distilled student. --as-published repeats what its code does
differently: the loss lacks the factor T^2, the teacher computes gradients that nobody uses, and the models are
evaluated in training mode, on images that are flipped at random.
"""

import argparse

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

ALPHA = 0.25  # the weight of the labels; the teacher has the rest
TEMPERATURE = 5.0  # T: above 1, the teacher also shows which wrong classes it finds likely


def distillation_loss(student_logits, teacher_logits, labels, scale_soft_loss=True):
    """ALPHA * CE(student, labels) + (1 - ALPHA) * T^2 * KL(teacher || student), the KL of probabilities softened by T.

    The logits are (N, C), the labels (N,). Softening makes the gradients of the KL about T^2 times smaller. The factor
    T^2 restores them (Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2).
    """
    hard = F.cross_entropy(student_logits, labels)
    soft = F.kl_div(
        F.log_softmax(student_logits / TEMPERATURE, dim=1),
        F.log_softmax(teacher_logits / TEMPERATURE, dim=1),
        log_target=True,
        reduction="batchmean",  # the mean over the images; "mean" would divide by the number of classes, too
    )
    scale = TEMPERATURE**2 if scale_soft_loss else 1.0
    return ALPHA * hard + (1 - ALPHA) * scale * soft


def cross_entropy(logits, images, labels):
    """The loss of a model that learns from the labels alone."""
    return F.cross_entropy(logits, labels)


def make_distillation_loss(teacher, as_published=False):
    """The loss of a student that learns from the labels and from the teacher's logits for the same images."""
    teacher.eval()  # its BatchNorm uses, and no longer changes, the averages that it has seen in training

    def loss(logits, images, labels):
        with torch.set_grad_enabled(as_published):
            teacher_logits = teacher(images)
        return distillation_loss(logits, teacher_logits, labels, scale_soft_loss=not as_published)

    return loss


def train(model, batches, loss, epochs=1):
    """Train the model in place on batches of images (N, 3, H, W) and labels (N,)."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    model.train()
    for epoch in range(1, epochs + 1):
        losses = []
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            logits = model(images)  # (N, C)
            batch_loss = loss(logits, images, labels)
            optimizer.zero_grad()
            batch_loss.backward()
            optimizer.step()
            losses.append(batch_loss.item())
        print(f"epoch {epoch}/{epochs}: loss {sum(losses) / len(losses):.4f}")


@torch.no_grad()
def evaluate(model, batches, as_published=False):
    """The model's accuracy, from 0 to 1."""
    device = next(model.parameters()).device
    if as_published:
        model.train()  # BatchNorm normalises each image by the other images of its batch
    else:
        model.eval()  # BatchNorm normalises by the averages that it has seen in training
    correct, total = 0, 0
    for images, labels in batches:
        predicted = model(images.to(device)).argmax(dim=1)  # (N,)
        correct += (predicted.cpu() == labels).sum().item()
        total += len(labels)
    return correct / total


def make_model(arch, seed):
    """A network with ImageNet weights and a new last layer for 10 classes."""
    torch.manual_seed(seed)  # students of one seed start with the same weights and see the same batches
    model = torchvision.models.get_model(arch, weights="DEFAULT")
    model.fc = nn.Linear(model.fc.in_features, 10)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def make_transform(flip, size=224):
    """From a PIL image to a normalised tensor (3, size, size)."""
    steps = [transforms.Resize((size, size))]
    if flip:
        steps.append(transforms.RandomHorizontalFlip())
    normalize = transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # ImageNet's
    return transforms.Compose([*steps, transforms.ToTensor(), normalize])


def load_cifar10(folder, train, flip_and_shuffle):
    """The training or the test images, and their labels, in batches of 100."""
    transform = make_transform(flip_and_shuffle)
    images = torchvision.datasets.CIFAR10(folder, train=train, transform=transform, download=True)
    return DataLoader(images, batch_size=100, shuffle=flip_and_shuffle, num_workers=2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as-published", action="store_true", help="with the original's loss and evaluation")
    parser.add_argument("--seed", type=int, default=0, help="accuracies differ between seeds: compare several")
    parser.add_argument("--data", default="data", help="folder of CIFAR-10")
    flags = parser.parse_args()

    training = load_cifar10(flags.data, train=True, flip_and_shuffle=True)
    test = load_cifar10(flags.data, train=False, flip_and_shuffle=flags.as_published)

    teacher = make_model("resnet50", flags.seed)
    train(teacher, training, cross_entropy, epochs=5)

    student = make_model("resnet18", flags.seed)
    train(student, training, cross_entropy, epochs=5)

    longer = make_model("resnet18", flags.seed)  # the baseline of the distilled student: as many epochs
    train(longer, training, cross_entropy, epochs=10)

    distilled = make_model("resnet18", flags.seed)
    train(distilled, training, make_distillation_loss(teacher, flags.as_published), epochs=10)

    models = {"teacher": teacher, "student": student, "student, 10 epochs": longer, "distilled student": distilled}
    for name, model in models.items():
        print(f"{name}: {evaluate(model, test, flags.as_published):.2%} of the test images")


if __name__ == "__main__":
    main()
