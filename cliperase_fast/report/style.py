"""The page's style sheet: the figures' colours, light and dark, and a layout from phones to desks."""

from __future__ import annotations

from cliperase_fast.report.plots import DARK, LIGHT

STYLE = f"""
:root {{
  --page: #f4f5f7; --surface: {LIGHT.surface}; --ink: {LIGHT.ink}; --muted: #5b6472;
  --line: {LIGHT.grid}; --forget: {LIGHT.forget}; --retain: {LIGHT.retain}; --before: #c9ced8;
  --good: #1c7c54; --mixed: #9a6700; --bad: #b42318;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --page: #0f1116; --surface: {DARK.surface}; --ink: {DARK.ink}; --muted: #a0a9b8;
    --line: {DARK.grid}; --forget: {DARK.forget}; --retain: {DARK.retain}; --before: #4a5261;
    --good: #4cc38a; --mixed: #e2b340; --bad: #ff7b6e;
  }}
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}}
main {{ max-width: 1104px; margin: 0 auto; padding: 40px 24px 64px; }}
h1, h2, h3, p, figure, dl, dd {{ margin: 0; }}
h1 {{ font-size: 32px; line-height: 1.2; letter-spacing: -.015em; overflow-wrap: anywhere; }}
h2 {{ font-size: 20px; line-height: 1.3; margin-bottom: 6px; }}
section {{ margin-top: 44px; }}
section > p {{ max-width: 74ch; color: var(--muted); overflow-wrap: anywhere; }}
.kind {{ color: var(--muted); font-size: 14px; margin-bottom: 4px; }}
.verdict {{
  max-width: 64ch; margin-top: 18px; padding-left: 16px; border-left: 4px solid var(--tone, var(--muted));
  font-size: 19px; line-height: 1.5;
}}
.verdict b {{ color: var(--tone, var(--muted)); }}
.good {{ --tone: var(--good); }} .mixed {{ --tone: var(--mixed); }} .bad {{ --tone: var(--bad); }}
.forget {{ --colour: var(--forget); }} .retain {{ --colour: var(--retain); }}
.pairs {{ display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px; }}
.pairs {{ margin-top: 14px; align-items: start; }}
.tiles {{ margin-top: 32px; }}
.card, figure, details, section > dl {{
  background: var(--surface); border: 1px solid var(--line); border-radius: 10px;
}}
.card {{ padding: 14px 20px; overflow: auto; max-height: 940px; }}
.tile h2 {{ font-size: 14px; font-weight: 600; color: var(--muted); margin: 0; }}
.numbers {{ font-size: 34px; line-height: 1.35; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.numbers span {{ color: var(--muted); }}
.numbers i {{ color: var(--muted); font-style: normal; margin: 0 .35em; }}
.numbers strong {{ color: var(--colour); }}
.bar {{ position: relative; height: 8px; margin: 8px 0; border-radius: 4px; overflow: hidden; }}
.bar {{ background: var(--line); }}
.bar i, .bar b {{ position: absolute; inset: 0 auto 0 0; }} .bar i {{ background: var(--before); }}
.bar b {{ background: var(--colour); }}
.note {{ font-size: 14px; color: var(--muted); }}
h3 {{ font-size: 16px; color: var(--colour); margin-bottom: 4px; }}
h3 span {{ color: var(--muted); font-weight: 400; font-size: 14px; margin-left: 4px; }}
table {{ width: 100%; border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 6px 0 6px 14px; text-align: left; border-top: 1px solid var(--line); font-weight: 400; }}
th:first-child, td:first-child {{ padding-left: 0; }}
thead th {{ color: var(--muted); font-size: 13px; border-top: 0; padding-top: 2px; }}
.card thead th {{ position: sticky; top: 0; background: var(--surface); }}
.n {{ text-align: right; white-space: nowrap; }}
tr.forget th, tr.forget td {{ color: var(--forget); font-weight: 600; }}
figure {{ padding: 8px 8px 14px; overflow: hidden; }}
img {{ display: block; width: 100%; height: auto; }}
figcaption {{ font-size: 14px; color: var(--muted); padding: 4px 12px 0; }}
details {{ margin-top: 12px; }}
summary {{ padding: 12px 20px; cursor: pointer; font-weight: 600; }}
dl {{ padding: 8px 20px; font-size: 15px; }}
section > dl {{ margin-top: 12px; }}
dl div {{ display: grid; grid-template-columns: 160px minmax(0, 1fr); gap: 16px; padding: 6px 0; }}
dl div + div {{ border-top: 1px solid var(--line); }}
dt {{ color: var(--muted); }} dd {{ overflow-wrap: anywhere; }}
details dl {{ columns: 2; column-gap: 40px; padding-top: 0; font-size: 14px; }}
details dl div {{ break-inside: avoid; padding: 4px 0; }}
details dl div + div {{ border-top: 0; }}
@media (max-width: 760px) {{
  main {{ padding: 24px 16px 48px; }}
  h1 {{ font-size: 26px; }} .verdict {{ font-size: 17px; }} section {{ margin-top: 36px; }}
  .pairs {{ grid-template-columns: minmax(0, 1fr); gap: 14px; }}
  .numbers {{ font-size: 30px; }}
  .card {{ padding-left: 16px; padding-right: 16px; max-height: 85vh; }}
  th, td {{ padding-left: 8px; font-size: 14px; }} thead th {{ font-size: 12px; }}
  summary, dl {{ padding-left: 16px; padding-right: 16px; }}
  dl div {{ grid-template-columns: minmax(0, 1fr); gap: 0; }}
  details dl {{ columns: 1; }} details dl div {{ grid-template-columns: 1fr 1fr; gap: 12px; }}
}}
@media print {{
  body {{ background: none; }} .card {{ max-height: none; }} figure, .tile {{ break-inside: avoid; }}
}}
"""
