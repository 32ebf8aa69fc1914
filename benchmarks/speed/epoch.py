"""An epoch of data."""

import torch

from benchmarks.measure import Case

PAIRS, BATCH, DIM = 100_000, 2048, 512


def batches(device):
    """An epoch of 100,000 pairs in batches of 2,048, D = 512: gathered on the device, against a DataLoader."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(PAIRS // 5, DIM, generator=generator).half().to(device)
    text = torch.randn(PAIRS, DIM, generator=generator).half().to(device)
    row_of = torch.arange(PAIRS, device=device) // 5

    class Rows(torch.utils.data.Dataset):
        def __init__(self):
            self.image, self.text, self.row_of = image.cpu().float(), text.cpu().float(), row_of.tolist()

        def __len__(self):
            return len(self.text)

        def __getitem__(self, index):
            return self.image[self.row_of[index]], self.text[index]

    loader = torch.utils.data.DataLoader(Rows(), batch_size=BATCH, shuffle=True)

    def ours():
        for rows in torch.randperm(len(text)).to(device).split(BATCH):
            image.index_select(0, row_of[rows]).float(), text.index_select(0, rows).float()

    def textbook():
        for x, y in loader:
            x.to(device), y.to(device)

    return Case(ours, textbook)


CASES = {"batches": batches}
