"""The same training in PyTorch on a GPU: channels-last, torch.compile with CUDA graphs, the data
on the device, TensorFloat-32 or autocast to bfloat16.
"""

import contextlib

import gpu_work as work
import torch
from torch import nn
from torch.nn import functional

flags = work.arguments()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
x_train, y_train, x_test, y_test = (
    torch.from_numpy(array).to(device) for array in work.load(flags)
)
y_train, y_test = y_train.long(), y_test.long()


def build():
    """Returns the notebook's network."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(9216, 256),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(256, 10),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):  # Keras' initialization
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model.to(device, memory_format=torch.channels_last)


def measure(batch_size: int, precision: str) -> None:
    """Times the epochs of one combination."""
    torch._dynamo.reset()
    high = "highest" if precision == "float32" else "high"
    torch.set_float32_matmul_precision(high)
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    torch.backends.cudnn.benchmark = True
    model = build()
    optimizer = torch.optim.Adadelta(
        model.parameters(),
        lr=torch.tensor(1.0) if device.type == "cuda" else 1.0,
        rho=0.95,
        eps=1e-7,
        foreach=True,
        capturable=device.type == "cuda",
    )
    mixed = precision == "mixed_bfloat16"

    def cast():
        return torch.autocast(device.type, torch.bfloat16) if mixed else contextlib.nullcontext()

    def loss_of(images, labels):
        scaled = images.unsqueeze(1).float().div(255)
        scaled = scaled.contiguous(memory_format=torch.channels_last)
        with cast():
            outputs = model(scaled)
        outputs = outputs.float()
        correct = (outputs.argmax(1) == labels).sum()
        return functional.cross_entropy(outputs, labels), correct

    mode = "reduce-overhead" if device.type == "cuda" else None
    compiled, update = torch.compile(loss_of, mode=mode), torch.compile(optimizer.step)

    def epoch():
        model.train()
        order = torch.randperm(len(x_train), device=device)
        loss_sum = torch.zeros((), device=device)
        correct_sum = torch.zeros((), dtype=torch.long, device=device)
        for rows in order.split(batch_size):
            if len(rows) < batch_size:  # Another shape would be compiled anew.
                continue
            torch.compiler.cudagraph_mark_step_begin()
            loss, correct = compiled(x_train[rows], y_train[rows])
            loss.backward()
            update()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += loss.detach() * len(rows)
            correct_sum += correct
        loss_sum.item()  # Waits for the device.

    steps = len(x_train) // batch_size
    name = "PyTorch, torch.compile"
    work.time_epochs(name, batch_size, precision, steps, flags.epochs, epoch)
    model.eval()
    with torch.inference_mode():
        right = sum(
            (model((images.unsqueeze(1).float() / 255)).argmax(1) == labels).sum().item()
            for images, labels in zip(x_test.split(1000), y_test.split(1000), strict=True)
        )
    work.say("accuracy", name=name, value=right / len(x_test), epochs=flags.epochs)


for precision in flags.precisions:
    for batch_size in flags.batch_sizes:
        measure(batch_size, precision)
