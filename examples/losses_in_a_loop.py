"""The losses alone in a training loop of one's own: features in, gradients out."""

import torch
import torch.nn.functional as F

import cliperase_fast as cf

torch.manual_seed(0)
student, teacher = (torch.nn.Linear(32, 16, bias=False) for _ in range(2))
student.load_state_dict(teacher.state_dict())
scale = torch.tensor(20.0)
forget, retain = torch.randn(8, 32), torch.randn(64, 32)
loss_of = cf.CLIPEraseLoss(lambda_retain=1.0, lambda_forget=3.0, lambda_consistency=3.0)
optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)

for step in range(50):
    with torch.no_grad():
        teacher_features = F.normalize(teacher(retain), dim=-1)
    f, r = F.normalize(student(forget), dim=-1), F.normalize(student(retain), dim=-1)
    other_forget, other_retain = F.normalize(forget[:, :16], dim=-1), F.normalize(retain[:, :16], dim=-1)
    terms = loss_of(f, other_forget, r, other_retain, teacher_features, other_retain, scale, scale)
    optimizer.zero_grad()
    terms.total.backward()
    optimizer.step()
    if step % 10 == 0:
        print(step, {name: round(float(value.detach()), 4) for name, value in terms._asdict().items()})
