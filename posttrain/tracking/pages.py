"""A template for HTML pages: a head with facts and links, tables, figures. Single files, no
scripts.
"""

from collections.abc import Mapping, Sequence
from html import escape


def html_page(title: str, facts: Sequence[str], links: Mapping[str, str], body: str, style: str = "") -> str:
    """`links`: address -> label, within the page or to others. `body` is HTML, the rest text."""
    anchors = " · ".join(f'<a href="{escape(address)}">{escape(name)}</a>' for address, name in links.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style><body><header><h1>{escape(title)}</h1>"
        f"<p>{escape(' · '.join(facts))}</p><nav>{anchors}</nav></header>{body}</body></html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure_html(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


_STYLE = """
:root{color-scheme:light dark;--ink:#1d232b;--soft:#67717e;--line:#dfe3e8;--page:#f6f7f9;--card:#fff;--inset:#f3f5f7;
--good:22,140,70;--bad:208,52,56}
@media(prefers-color-scheme:dark){:root{--ink:#dfe4ea;--soft:#8d97a5;--line:#30363e;--page:#14171b;--card:#1c2026;--inset:#15181c;
--good:60,180,105;--bad:235,90,90}}
*{box-sizing:border-box}
body{font:14px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;color:var(--ink);background:var(--page);
max-width:1200px;margin:0 auto;padding:24px 20px 60px}
header{margin-bottom:18px}header p,nav{margin:4px 0}header p,.soft{color:var(--soft)}a{color:inherit}
h1{font-size:22px;margin:0}h2{font-size:18px;margin:0 0 10px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
th,td{text-align:right;padding:3px 7px;border-bottom:1px solid var(--line);white-space:nowrap}th{color:var(--soft);font-weight:500}
th:first-child,td:first-child{text-align:left}
figure{margin:14px 0;background:#fff;border:1px solid var(--line);border-radius:6px;padding:8px}figure svg{display:block;height:auto}
figcaption{color:#67717e;font-size:12px;padding:4px 6px 0}
pre,dd,code{font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;
overflow-wrap:anywhere;unicode-bidi:plaintext;margin:0}
.chip{font-variant-numeric:tabular-nums;font-size:12px;font-weight:400;white-space:nowrap;padding:0 7px;border-radius:9px;
background:var(--inset);color:var(--soft)}
.chip.good{background:rgba(var(--good),.16);color:rgb(var(--good))}.chip.bad{background:rgba(var(--bad),.14);color:rgb(var(--bad))}
"""
