"""The same training in PyTorch: channels-last, the data as tensors in memory."""

import torch
import work
from torch import nn
from torch.nn import functional

flags = work.arguments()
torch.set_num_threads(flags.threads)

x_train, y_train, x_test, y_test = (torch.from_numpy(array) for array in work.load(flags))

model = nn.Sequential(
    nn.Conv2d(1, 32, 3),
    nn.ReLU(),
    nn.Conv2d(32, 64, 3),
    nn.MaxPool2d(2),  # It commutes with ReLU, which has a quarter to do behind it.
    nn.ReLU(),
    nn.Dropout(0.25),
    nn.Flatten(),
    nn.Linear(9216, 256),
    nn.ReLU(),
    nn.Dropout(0.5),
    nn.Linear(256, 10),
).to(memory_format=torch.channels_last)
for layer in model:
    if isinstance(layer, nn.Conv2d | nn.Linear):  # Keras' initialization
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0, rho=0.95, eps=1e-7, foreach=True)


def inputs(images):
    """Returns float32 (n, 1, 28, 28), 0 to 1, channels last."""
    scaled = images.unsqueeze(1).float().div_(255)
    return scaled.contiguous(memory_format=torch.channels_last)


for epoch in range(flags.epochs):
    model.train()
    order = torch.randperm(len(x_train))
    loss_sum = correct = 0
    for step, rows in enumerate(order.split(flags.batch_size), start=1):
        targets = y_train[rows].long()
        outputs = model(inputs(x_train[rows]))
        loss = functional.cross_entropy(outputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            loss_sum += loss.item() * len(rows)
            correct += (outputs.argmax(1) == targets).sum().item()
        if step == 1 or step % 10 == 0:
            work.say("step", step=step)
    model.eval()
    with torch.inference_mode():
        right = sum(
            (model(inputs(x_test[rows])).argmax(1) == y_test[rows]).sum().item()
            for rows in torch.arange(len(x_test)).split(flags.batch_size)
        )
    work.say("epoch", epoch=epoch + 1, accuracy=right / len(x_test))
if flags.output:
    torch.save(model.state_dict(), flags.output)
