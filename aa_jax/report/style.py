"""The look of a report, and the few lines of script it can do without.

Line colours follow Okabe and Ito's palette (distinct under the common colour-vision deficiencies),
darkened or lightened per theme; every line also has its own dash pattern.
"""

CSS = """
:root{color-scheme:light dark;
--page:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#5a6370;--rule:#dfe3e8;--grid:#e9ecf0;
--link:#0a58a6;--good:#00755c;--bad:#b8420b;--accent:#0a63b0;--even:#7b8490;--mark:#fff6d6;
--s0:#0a63b0;--s1:#cf4f0a;--s2:#00836a;--s3:#a83e8c;--s4:#a87600;--s5:#454c55;--s6:#2f95cf;
--s7:#8a5a2b}
@media (prefers-color-scheme:dark){:root{
--page:#14171b;--card:#1d2127;--ink:#e7eaee;--soft:#9fa8b3;--rule:#333a43;--grid:#282e36;
--link:#79b8ff;--good:#37c8a3;--bad:#ff9257;--accent:#62adf6;--even:#8f98a4;--mark:#3a341d;
--s0:#62adf6;--s1:#ff8f52;--s2:#37c8a3;--s3:#e690cc;--s4:#e3b842;--s5:#c9ced5;--s6:#9cdcff;
--s7:#cda177}}
*{box-sizing:border-box}
html{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
background:var(--page);color:var(--ink);-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0 auto;max-width:72rem;padding:2.5rem clamp(1rem,4vw,2.5rem) 4rem}
a{color:var(--link)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
h1{font-size:clamp(1.6rem,4.5vw,2.3rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .6rem}
h2{font-size:1.3rem;letter-spacing:-.01em;line-height:1.25;margin:0 0 .4rem}
h3{font-size:1rem;line-height:1.3;margin:0 0 .25rem}
p,ul{margin:0 0 .8rem}
code,pre,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
font-size:.86em}
code{background:var(--card);padding:.1em .3em;border-radius:4px;overflow-wrap:anywhere}
small,.small,.note{font-size:.84rem;color:var(--soft)}
.note,.small{margin:0 0 .7rem;max-width:46rem}
.lede{font-size:1.08rem;max-width:46rem}
.prose{max-width:46rem}
header.top{border-bottom:1px solid var(--rule);padding-bottom:1.2rem}
.meta{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem 1.1rem;
margin:1rem 0 0;font-size:.88rem}
.meta dt{color:var(--soft)}
.meta dd{margin:0;overflow-wrap:anywhere}
nav{margin:1.1rem 0 0;font-size:.9rem}
nav ul{list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
section{margin-top:2.8rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));
gap:0 2.4rem;margin-top:1rem}
.grid>div{min-width:0;display:grid;grid-template-rows:subgrid;grid-row:span 3;padding-bottom:2rem}
.grid figure{display:contents}
.grid>div>:nth-child(2):last-child:not(figure){grid-row:span 2}
.head{display:flex;flex-direction:column}
.head .axis-y{margin-top:auto}
.empty{color:var(--soft);font-style:italic}

.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,9.5rem),1fr));gap:.8rem;
margin:.8rem 0 0;padding:0}
.tiles div{background:var(--card);border-radius:10px;padding:.8rem 1rem .9rem;display:flex;
flex-direction:column}
.tiles dt{font-size:.84rem;color:var(--soft);order:-2}
.tiles dd{margin:0}
.tiles dd.big{font-size:1.65rem;font-weight:650;letter-spacing:-.02em;line-height:1.2;order:-1;
overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.tiles dd.fine{font-size:.8rem;color:var(--soft)}

.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;margin:.2rem 0 .5rem;
padding:0;font-size:.86rem}
.legend li{display:flex;align-items:center;gap:.4rem}
.legend b,.bars b{font-variant-numeric:tabular-nums;font-weight:600}
.axis-y,.axis-x{font-size:.8rem;color:var(--soft)}
.axis-y{margin-bottom:.35rem}
.axis-x{text-align:right;margin-top:1.55rem}
.plot{position:relative;height:clamp(13rem,34vw,17.5rem);font-size:.78rem;
margin:.3rem .9rem 0 calc(var(--gutter) + .7rem)}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.ty,.tx{position:absolute;color:var(--soft);white-space:nowrap;font-variant-numeric:tabular-nums;
line-height:1}
.ty{right:calc(100% + .55rem);transform:translateY(-50%)}
.tx{top:calc(100% + .5rem);transform:translateX(-50%)}
path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:butt}
.plot path.grid{stroke:var(--grid);stroke-width:1}
.reference{stroke:var(--soft);stroke-width:1.4;stroke-dasharray:2 4}
.line{stroke-width:2}
.raw{stroke-width:1;opacity:.28}
.band{fill:var(--c);opacity:.16}
.dots{stroke-width:6.5;stroke-linecap:round}
.line,.raw,.dots{stroke:var(--c)}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}
.s4{--c:var(--s4)}.s5{--c:var(--s5)}.s6{--c:var(--s6)}.s7{--c:var(--s7)}
.line.s1{stroke-dasharray:8 3}.line.s2{stroke-dasharray:3 2.5}.line.s3{stroke-dasharray:10 3 2.5 3}
.line.s4{stroke-dasharray:14 4}.line.s5{stroke-dasharray:5 2 2 2 2 2}
.line.s6{stroke-dasharray:1.8 3}.line.s7{stroke-dasharray:16 3 3 3 3 3}
details.data{margin-top:.3rem;font-size:.84rem}
summary{cursor:pointer;color:var(--soft);width:max-content;max-width:100%}
details[open]>summary{margin-bottom:.5rem}

.bars{list-style:none;margin:.8rem 0 0;padding:0}
.bars li{display:grid;grid-template-columns:minmax(6rem,13rem) minmax(0,1fr) 13.5rem;gap:0 1.1rem;
align-items:center;padding:.3rem 0}
.bars li.group{display:block;font-weight:600;font-size:.88rem;padding-top:.9rem}
.bars .label{overflow-wrap:anywhere;line-height:1.3}
.bars .track{position:relative;height:1.35rem;background:var(--card);border-radius:3px}
.bars i{position:absolute;top:0;bottom:0}
.bars .fill{background:var(--c);border-radius:2px;top:3px;bottom:3px}
.bars .whisker{top:50%;bottom:auto;height:9px;margin-top:-4.5px;border:solid var(--ink);
border-width:0 1.6px}
.bars .whisker::after{content:"";position:absolute;inset:3.7px 0 auto;
border-top:1.6px solid var(--ink)}
.bars .mark{border-left:1.6px dashed var(--ink);top:-.3rem;bottom:-.3rem;opacity:.6}
.bars li{--c:var(--accent)}.bars .above{--c:var(--good)}.bars .below{--c:var(--bad)}
.bars .even{--c:var(--even)}
.bars .fill{opacity:.62}
.bars .sign{color:var(--c)}
.bars .value{line-height:1.25;font-variant-numeric:tabular-nums}
.bars .value small{display:block}
.bars .axis{padding:0 0 1.2rem}
.bars .ruler{position:relative;grid-column:2;font-size:.78rem;color:var(--soft);height:1rem}
.bars .ruler span{position:absolute;transform:translateX(-50%);top:.2rem}

.scroll{overflow-x:auto;margin-top:.6rem}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:min(100%,24rem)}
th,td{text-align:left;padding:.42rem .9rem .42rem .6rem;border-bottom:1px solid var(--rule);
vertical-align:top}
thead th{color:var(--soft);font-weight:600;font-size:.84rem;border-bottom-color:var(--soft);
vertical-align:bottom}
td.number,th.number{text-align:right}
td{max-width:34rem;overflow-wrap:break-word}
tr.highlight>*{background:var(--mark);font-weight:600}
th button{all:unset;cursor:pointer}
th button:focus-visible{outline:2px solid var(--accent)}
th[aria-sort=ascending] button::after{content:" ↑"}
th[aria-sort=descending] button::after{content:" ↓"}
table.pairs{width:100%;table-layout:fixed}
table.pairs th{width:34%;font-weight:400;color:var(--soft);overflow-wrap:anywhere}
table.pairs td{overflow-wrap:anywhere}

.sample{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.8rem 1.4rem;
border-top:1px solid var(--rule);padding:1.1rem 0 1.2rem}
.sample:first-of-type{margin-top:.9rem}
.sample .media{display:flex;flex-direction:column;gap:.9rem;max-width:240px}
.sample.text{grid-template-columns:minmax(0,1fr)}
.sample .cells{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,15.5rem),1fr));
gap:.9rem 1.4rem;margin:0;align-content:start}
.sample dl,.sample dd{margin:0}
.sample dt{font-size:.8rem;color:var(--soft);font-weight:600}
.sample dd{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.93rem;line-height:1.5}
.cells>div{border-left:3px solid var(--tone,transparent);padding-left:.7rem;
margin-left:calc(-.7rem - 3px)}
.cells .good{--tone:var(--good)}.cells .bad{--tone:var(--bad)}.cells .accent{--tone:var(--accent)}
.cells dd.long{max-height:15rem;overflow-y:auto}
.sample .scores{grid-column:1/-1;display:flex;flex-wrap:wrap;gap:.2rem 1.5rem;font-size:.86rem}
.sample .scores div{display:flex;gap:.45rem;align-items:baseline}
.sample .scores dd{font-weight:600;font-variant-numeric:tabular-nums}
.strip{display:flex;flex-wrap:wrap;gap:.4rem}
.zoom{all:unset;cursor:zoom-in;display:block;line-height:0;border-radius:6px}
.zoom:focus-visible{outline:2px solid var(--accent)}
.zoom img{max-width:100%;height:auto;border-radius:4px;box-shadow:0 0 0 1px var(--rule)}
.pixels{image-rendering:pixelated}
audio,video{max-width:15rem;width:15rem}
dialog{border:0;padding:0;background:transparent;max-width:94vw;max-height:94vh}
dialog::backdrop{background:rgb(0 0 0/.8)}
dialog img{display:block;width:min(90vw,60rem);max-height:90vh;object-fit:contain;cursor:zoom-out}
footer{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--rule);font-size:.84rem;
color:var(--soft)}

@media (max-width:44rem){
.bars li{grid-template-columns:minmax(0,1fr) auto;grid-template-areas:"l v" "t t";gap:.25rem 1rem}
.bars .label{grid-area:l}.bars .value{grid-area:v;text-align:right}.bars .track{grid-area:t}
.bars .ruler{grid-column:1/-1}
.sample{grid-template-columns:minmax(0,1fr)}
.sample .media{max-width:none;flex-direction:row;flex-wrap:wrap}
.meta{grid-template-columns:minmax(0,1fr);gap:0}
.meta dd{margin-bottom:.4rem}
table.pairs th{width:44%}
}
@media print{
:root{color-scheme:light;
--page:#fff;--card:#f4f5f7;--ink:#000;--soft:#444;--rule:#ccc;--grid:#e2e2e2;--link:#000;
--good:#00755c;--bad:#b8420b;--accent:#0a63b0;--even:#7b8490;--mark:#fff6d6;
--s0:#0a63b0;--s1:#cf4f0a;--s2:#00836a;--s3:#a83e8c;--s4:#a87600;--s5:#454c55;--s6:#2f95cf;
--s7:#8a5a2b}
html{font-size:12px}
body{max-width:none;padding:0;-webkit-print-color-adjust:exact;print-color-adjust:exact}
nav,details.data,audio,video{display:none}
figure,.grid>div,.sample,.tiles,tr{break-inside:avoid}
h2,h3{break-after:avoid}
.cells dd.long{max-height:none}
section{margin-top:1.8rem}
}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
figure{margin:0}
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const number = head.classList.contains("number");
    const text = row => row.cells[column].textContent;
    const value = row => Number(row.cells[column].dataset.value ?? -Infinity);
    const compare = (a, b) => number ? value(a) - value(b) || 0 : text(a).localeCompare(text(b));
    const rows = [...body.rows].sort(compare);
    body.append(...(down ? rows.reverse() : rows));
  });
}
const dialog = document.querySelector("dialog");
if (dialog) {
  for (const button of document.querySelectorAll(".zoom")) {
    button.addEventListener("click", () => {
      const image = button.firstElementChild.cloneNode();
      image.removeAttribute("width");
      image.removeAttribute("height");
      dialog.replaceChildren(image);
      dialog.showModal();
    });
  }
  dialog.addEventListener("click", () => dialog.close());
}
"""
