"""The style of a report's page: light and dark, from a phone to a wide screen."""

from sharpmoe.report.svg import CHART_STYLE, chart_colours

PAGE_STYLE = f"""
:root {{ color-scheme: light dark; --text: #1d2126; --dim: #5d6670; --page: #fff; --panel: #f5f6f8;
  --rule: #dfe3e8; --good: #2a8a3a; --bad: #b3262d; --warning: #b86e00; --note: #5d6670; --unknown: #7a52a8 }}
* {{ box-sizing: border-box }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 1.5em auto; padding: 0 16px;
  color: var(--text); background: var(--page); overflow-wrap: break-word }}
h1 {{ font-size: 1.5em; overflow-wrap: anywhere; margin: .4em 0 }}
h2 {{ font-size: 1.15em; margin: 1.8em 0 .5em }}
figure {{ margin: 0 }}
figcaption {{ font-size: 13px; overflow-wrap: anywhere }}
small, .dim {{ color: var(--dim) }}
img {{ max-width: 100%; height: auto; vertical-align: top }}
summary {{ cursor: pointer; margin: .8em 0; color: var(--dim) }}
.verdict {{ list-style: none; padding: 0; margin: 1em 0 }}
.verdict li {{ border-left: 5px solid var(--note); background: var(--panel); padding: 7px 12px; margin: 5px 0;
  border-radius: 3px; overflow-wrap: anywhere }}
.verdict li:first-child {{ font-size: 1.12em; font-weight: 600 }}
.verdict .good {{ border-color: var(--good) }}
.verdict .bad {{ border-color: var(--bad) }}
.verdict .warning {{ border-color: var(--warning) }}
.verdict .unknown {{ border-color: var(--unknown) }}
.scroll {{ overflow-x: auto; max-width: 100% }}
table {{ border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; vertical-align: top; padding: 3px 16px 3px 0; border-bottom: 1px solid var(--rule);
  max-width: 34em; overflow-wrap: break-word }}
th[scope=row] {{ font-weight: normal; color: var(--dim); min-width: 9em }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px 18px }}
.chart figcaption {{ font-weight: 600 }}
.chart small {{ font-weight: normal }}
{CHART_STYLE}
.beside {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px }}
.maprow {{ display: flex; flex-wrap: wrap; gap: 6px 14px; margin: 0 0 12px }}
.group {{ flex: 1 1 150px; max-width: 240px; min-width: 0 }}
.group b {{ font-size: 12px; display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(66px, 1fr)); gap: 4px }}
.pair img {{ width: 100%; display: block }}
.map {{ image-rendering: pixelated }}
.pair figcaption {{ font-size: 11px; color: var(--dim); line-height: 1.25 }}
.scale {{ font-size: 12px; color: var(--dim) }}
.scale i {{ display: inline-block; width: 140px; height: 10px; margin: 0 4px }}
.scale span {{ margin-left: 10px }}
.run {{ border-top: 2px solid var(--rule); margin-top: 2em }}
.run > summary {{ font-size: 1.15em; color: var(--text) }}
{chart_colours(dark=False)}
@media (max-width: 520px) {{
th, td {{ padding-right: 10px }}
.group {{ flex: 1 1 calc(50% - 7px); max-width: calc(50% - 7px) }}
.pair {{ grid-template-columns: repeat(auto-fit, minmax(56px, 1fr)) }}
.maprow {{ border-bottom: 1px solid var(--rule); padding-bottom: 8px }}
}}
@media (prefers-color-scheme: dark) {{
:root {{ --text: #e3e6ea; --dim: #9aa4af; --page: #15181c; --panel: #20242a; --rule: #333a43; --good: #6fce7c;
  --bad: #ff7b7f; --warning: #ffb454; --note: #9aa4af; --unknown: #bda0ea }}
{chart_colours(dark=True)}
}}
"""
