"""The look of a report page and of its charts, and the one script: values under the pointer. Nothing is fetched."""

STYLE = """
:root{color-scheme:light dark;--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
 --page:#f5f6f8;--surface:#fff;--text:#171b22;--muted:#626c7a;--line:#e0e4ea;--grid:#e9ecf1;--up:#0a7a4b;
 --down:#c22f2f;--c0:#2563d9;--c1:#d9640a;--c2:#0b8a74;--c3:#8b44c9;--c4:#b58100;--c5:#c2316d;--before:#a9b2bf;
 --blank:#dfb98c}
@media screen and (prefers-color-scheme:dark){
:root{--page:#0e1116;--surface:#161a21;--text:#e7eaf0;--muted:#98a2b1;--line:#2a313c;--grid:#242a34;--up:#4cc38a;
 --down:#ff7b72;--c0:#6aa1ff;--c1:#ff9d4d;--c2:#3cc9ae;--c3:#c297f5;--c4:#e3b341;--c5:#f778ad;--before:#566070;
 --blank:#8a6a42}
}*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.55 var(--sans);-webkit-print-color-adjust:exact;
 print-color-adjust:exact}
header,main,footer{max-width:1160px;margin:0 auto;padding:0 24px}header{padding-top:44px}
footer{padding-bottom:56px;color:var(--muted)}h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:0}
h2{font-size:21px;letter-spacing:-.01em;margin:52px 0 14px}h3{font-size:16px;margin:26px 0 10px}
h3 small,th small{font-weight:400;font-size:13px;color:var(--muted);margin-left:6px}
header p,.note{color:var(--muted);margin:6px 0 0;overflow-wrap:anywhere}.note{margin:0 0 14px;max-width:72ch}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;margin-top:18px;padding-bottom:14px;border-bottom:1px solid var(--line)}
a{color:var(--c0);text-decoration:none}a:hover{text-decoration:underline}figure{margin:0}
.card,.tile,.sample{background:var(--surface);border:1px solid var(--line);border-radius:12px}.card{padding:20px}
.tiles{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,240px),1fr));margin-top:26px}
.tile{padding:16px 18px}
.tile b,.tile span{display:block;font-size:13px;font-weight:500;color:var(--muted);line-height:1.4}
.tile strong{display:block;white-space:nowrap;font-size:28px;line-height:1.25;letter-spacing:-.02em;margin:6px 0 4px;
 font-variant-numeric:tabular-nums}
.tile i,.tile em{font-style:normal;font-weight:400;color:var(--muted);font-size:20px}.tile em{margin:0 8px}
.key{border-color:var(--c0);box-shadow:inset 0 3px 0 var(--c0)}
.small{display:grid;grid-template-columns:repeat(3,1fr);gap:22px;margin-top:22px;padding-top:20px;
 border-top:1px solid var(--line)}
.narrow{display:none}.scroll{overflow-x:auto;padding:6px 20px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:9px 0 9px 18px;text-align:right;white-space:nowrap}tr>:first-child{text-align:left;padding-left:0}
tbody th{font-weight:500}thead th{font-size:13px;font-weight:500;color:var(--muted)}
tbody tr,tfoot tr{border-top:1px solid var(--line)}tfoot{font-weight:600}
thead .group{text-align:center;color:var(--text);font-weight:600;padding-bottom:0}.frozen,.none{color:var(--muted)}
td.up{color:var(--up)}td.down{color:var(--down)}.divider th{color:var(--muted);font-size:13px;padding-top:20px}
.compare tr>:first-child{width:62%}.measure{display:flex;align-items:center;gap:18px}
.measure>span{flex:0 0 190px;min-width:0;white-space:normal;overflow-wrap:anywhere}
.bars{flex:1;min-width:60px;background:linear-gradient(var(--line),var(--line)) 50% 0/1px 100% no-repeat,var(--grid);
 border-radius:3px}
.bars i{display:block;height:5px;border-radius:0 3px 3px 0}.bars i+i{margin-top:1px}i.before{background:var(--before)}
i.after{background:var(--c0)}
i.blank{background:repeating-linear-gradient(135deg,var(--blank) 0 3px,transparent 3px 5px)}
i.shuffle{background:repeating-linear-gradient(90deg,var(--blank) 0 3px,transparent 3px 5px)}
i.noise{background:repeating-linear-gradient(45deg,var(--c4) 0 2px,transparent 2px 4px)}
.key-line{display:flex;gap:8px 22px;flex-wrap:wrap;color:var(--muted);font-size:13px;margin:0}
.key-line i{display:inline-block;width:22px;height:8px;border-radius:2px;margin-right:8px}
.filter{display:flex;flex-wrap:wrap;gap:6px 18px;margin:0 0 14px}.filter label{cursor:pointer}
.filter input{accent-color:var(--c0);margin:0 6px 0 0}
.samples{display:grid;gap:16px;align-items:start;
 grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr))}
.sample{overflow:hidden;display:flex;flex-direction:column}
.sample img,.sample .gone{width:100%;aspect-ratio:4/3;object-fit:contain;background:var(--grid);display:block}
.pictures{display:grid;grid-template-columns:1fr 1fr;gap:1px}
.sample .gone{display:grid;text-align:center;place-items:center;color:var(--muted);font-size:13px}
.sample>div:last-child{padding:14px 16px 16px;display:flex;flex-direction:column;gap:10px;flex:1}
.sample p{margin:0;font-weight:500;overflow-wrap:anywhere;white-space:pre-line}
.sample .top{display:flex;justify-content:space-between;gap:12px;font-size:13px;color:var(--muted)}
.top>*{min-width:0;overflow-wrap:anywhere}
.sample .top b{font-weight:600}.right .top b{color:var(--up)}.wrong .top b{color:var(--down)}
dl{display:grid;grid-template-columns:auto 1fr;gap:3px 16px;margin:0;font-size:14px}dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
#samples:has(#only-wrong:checked) .sample:not(.wrong),#samples:has(#only-right:checked) .sample:not(.right){
 display:none}
details{background:var(--surface);border:1px solid var(--line);border-radius:12px}
summary{cursor:pointer;padding:13px 20px;font-weight:500}
pre{margin:0;padding:16px 20px;border-top:1px solid var(--line);overflow-x:auto;
 font:13px/1.55 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
.drawn{background:#fff;margin-top:18px}.drawn img{display:block;width:100%;min-width:600px}
.missing{color:var(--muted);border-left:3px solid var(--line);padding-left:12px;margin:22px 0}
@media(max-width:700px){header,main,footer{padding-left:16px;padding-right:16px}header{padding-top:28px}
h1{font-size:25px}.tiles{grid-template-columns:1fr 1fr;grid-auto-flow:dense;gap:10px}
.tile{padding:13px 14px}.tile strong{font-size:22px}.key{grid-column:1/-1}
.wide{display:none}.narrow{display:block}.small{grid-template-columns:1fr}.card{padding:14px}
.scroll{padding:4px 14px}th,td{padding-left:12px}.compare{font-size:13px}
.compare tr>:first-child{width:auto;min-width:96px}.compare th+*,.compare td{padding-left:9px}
.compare th:first-child{padding-left:0}
.measure{flex-direction:column;align-items:stretch;gap:6px}.measure>span{flex:none}
.compare tr:not(.divider)>:first-child{white-space:normal}.compare small{display:block;margin:0}}
@media print{body{background:#fff;font-size:12px}header,main{padding:0}.scroll{overflow:visible}
.drawn img{min-width:0}table{font-size:11px}
th,td{padding:6px 0 6px 8px}.tiles{grid-template-columns:repeat(4,1fr);gap:8px}.tile{padding:10px 12px}
.tile strong{font-size:18px}h3 small,th small,thead th{font-size:11px}
.samples{grid-template-columns:repeat(4,1fr);gap:8px}.sample>div:last-child{padding:10px}dl{font-size:11px}
.tile,figure,.sample,tr{break-inside:avoid}h2,h3{break-after:avoid}
nav,.filter{display:none}details::details-content{content-visibility:visible;height:auto}pre{white-space:pre-wrap}}
.chart{display:block;width:100%;height:auto;overflow:visible}
.chart text{font:12px var(--sans);fill:var(--muted);font-variant-numeric:tabular-nums}
.chart .title{font-size:14px;font-weight:600;fill:var(--text)}.chart .grid{stroke:var(--grid);stroke-width:1}
.chart .axis{stroke:var(--muted);stroke-opacity:.6}
.chart .series{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.chart .raw{stroke-width:1;stroke-opacity:.5}.chart .dot{stroke:var(--surface);stroke-width:1.5}
.chart .mark{stroke:var(--muted);stroke-dasharray:3 3}.chart .hover{stroke:var(--muted);stroke-opacity:.7}
"""

# Nearest drawn point of each line under the pointer. A chart is complete without it.
SCRIPT = """
for(const svg of document.querySelectorAll('.chart')){
 const line=svg.querySelector('.hover'),label=svg.querySelector('.readout');if(!line)continue;
 const [x0,x1,left,right,y0,y1,bottom,top]=svg.dataset.axes.split(' ').map(Number),log=svg.dataset.log==='1';
 const width=svg.viewBox.baseVal.width,title=svg.querySelector('.title');
 const rows=[...svg.querySelectorAll('polyline')].filter(p=>width>600||!p.matches('.raw'))
  .map(p=>[p.dataset.name,[...p.points]]);
 const show=v=>{const a=Math.abs(v);return a&&(a<1e-3||a>=1e5)?v.toExponential(2):String(+v.toPrecision(4))};
 const value=y=>{const t=(y-bottom)/(top-bottom);return log?Math.exp(Math.log(y0)+t*Math.log(y1/y0)):y0+t*(y1-y0)};
 svg.addEventListener('pointermove',event=>{
  const at=new DOMPoint(event.clientX,event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
  const near=rows.map(([name,ps])=>[name,ps.reduce((a,b)=>Math.abs(b.x-at)<Math.abs(a.x-at)?b:a)]);
  if(!near.length||at<left-4||at>right+4){line.style.display='none';label.textContent='';title.style.opacity=1;return}
  const x=near[near.length-1][1].x;line.style.display='';line.setAttribute('x1',x);line.setAttribute('x2',x);
  const step=Math.round(x0+(x-left)/(right-left)*(x1-x0));
  label.textContent=['step '+step,...near.map(([name,p])=>name+' '+show(value(p.y)))].join('  \\u00b7  ');
  title.style.opacity=label.getComputedTextLength()>width-120?0:1});
 svg.addEventListener('pointerleave',()=>{line.style.display='none';label.textContent='';title.style.opacity=1})}
"""
