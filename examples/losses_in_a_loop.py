"""Use only the losses, in your own training loop: features in, gradients out.

Needs: no extra and no model. A linear layer replaces the image tower, and the text features are constant.
"""

import torch
import torch.nn.functional as F

import cliperase_fast as cf

torch.manual_seed(0)
student, teacher = (torch.nn.Linear(32, 16, bias=False) for _ in range(2))
student.load_state_dict(teacher.state_dict())
scale = torch.tensor(20.0)
forget, retain = torch.randn(8, 32), torch.randn(64, 32)
forget_texts, retain_texts = (F.normalize(teacher(images).detach(), dim=-1) for images in (forget, retain))
loss_of = cf.CLIPEraseLoss(lambda_retain=1.0, lambda_forget=3.0, lambda_consistency=3.0)
optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)

print("8 pairs are pushed apart (forget: their mean cosine), 64 are kept (retain, consistency).")
for step in range(101):
    with torch.no_grad():
        frozen = F.normalize(teacher(retain), dim=-1)
    f, r = F.normalize(student(forget), dim=-1), F.normalize(student(retain), dim=-1)
    terms = loss_of(f, forget_texts, r, retain_texts, frozen, retain_texts, scale, scale)
    if step % 20 == 0:
        print(step, {name: round(float(value.detach()), 4) for name, value in terms._asdict().items()})
    optimizer.zero_grad()
    terms.total.backward()
    optimizer.step()
print(f"The mean cosine of the pairs to forget fell from 1.000 to {terms.forget.item():.3f}.")
