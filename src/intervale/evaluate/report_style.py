"""The report's style sheet: dark on light, for a screen, a phone and paper. No font, picture or rule from elsewhere."""

STYLE = """
:root { color-scheme: light; --ink: #1b2430; --soft: #5a6878; --line: #e1e6ec; --paper: #fff; --ground: #f4f6f9;
        --before: #b4bfcd; --after: #4aa899; --good: #17705f; --bad: #b3412f; --warn: #b42318; --train: #2a5d9c; --held: #c2571a; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
       "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 62rem; margin: 0 auto; padding: 1.75rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.3; margin: 0 0 .15rem; letter-spacing: -.01em; } h2 { font-size: 1.1rem; line-height: 1.35; margin: 0 0 .8rem; }
h2 .count { color: var(--soft); font-weight: 400; } h3 { font-size: .88rem; margin: 1.2rem 0 .5rem; color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 1.25rem 1.4rem; margin-top: 1rem; break-inside: avoid; }
section.long { break-inside: auto; } section.long > h2, section.long > p, h3 { break-after: avoid; }
.soft { color: var(--soft); font-size: .88rem; } p { margin: .4rem 0; } .under { overflow-wrap: anywhere; }
.banner { background: #fdecea; border: 1px solid #f3b9b3; border-left: 6px solid var(--warn); color: #7c1a12; border-radius: 10px;
          padding: .8rem 1.1rem; margin-top: 1rem; } .banner strong { display: block; } .banner .soft { color: inherit; }
.note { background: #fdf6e7; border: 1px solid #ecd9ac; border-left: 6px solid #c58a1b; color: #6b4a0c; border-radius: 10px; padding: .7rem 1.1rem; margin: 1rem 0; break-inside: avoid; }
.note .soft { color: inherit; } .note ul { margin: .3rem 0 0; padding-left: 1.2rem; } main > .note { margin-bottom: 0; } section > .banner { margin: 0 0 .8rem; }
.hero { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem 2.2rem; }
.number b { display: block; font-size: 2.8rem; line-height: 1.15; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.number b small { font-size: 1.05rem; font-weight: 600; letter-spacing: 0; }
.arrow { font-size: 1.9rem; color: var(--soft); margin-top: 1.75rem; }
.change { margin-left: auto; text-align: right; } .change b.up { color: var(--good); } .change b.down { color: var(--bad); }
.words { font-size: 1.05rem; margin: 1.1rem 0 .6rem; } .legend { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin: .5rem 0 0; }
.also { border-top: 1px solid var(--line); margin: 1rem -1.4rem -1.25rem; padding: .8rem 1.4rem .9rem; background: #f8fafc; border-radius: 0 0 12px 12px; font-variant-numeric: tabular-nums; }
.row { display: grid; grid-template-columns: minmax(6rem, 13rem) 1fr 9.5rem; gap: .15rem .9rem; align-items: center; padding: .42rem 0; border-top: 1px solid var(--line); break-inside: avoid; }
.row:first-of-type { border-top: 0; } .row .value { font-size: .85rem; text-align: right; font-variant-numeric: tabular-nums; }
.value small { display: block; color: var(--soft); font-size: .78rem; line-height: 1.25; } .value small.up { color: var(--good); font-weight: 600; } .value small.down { color: var(--bad); font-weight: 600; }
svg.single { height: .95rem; } .measures th:first-child, .measures td:first-child { text-align: left; } .measures td { font-size: .95rem; }
.reliability { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 1rem 2rem; max-width: 46rem; margin: .6rem auto .4rem; }
figure { margin: 0; break-inside: avoid; } figcaption { display: flex; justify-content: space-between; color: var(--soft); font-size: .9rem; } figcaption b { color: var(--ink); font-variant-numeric: tabular-nums; }
figure svg { overflow: visible; } figure text { font-size: 4px; fill: var(--soft); } figure p { font-size: .88rem; text-align: center; margin: .1rem 0 0; }
.label { overflow-wrap: anywhere; } .label small { color: var(--soft); white-space: nowrap; }
svg { display: block; width: 100%; } svg.bars { height: 1.9rem; } svg.wide { height: 3.4rem; margin-top: 1.1rem; }
.scale { display: flex; justify-content: space-between; color: var(--soft); font-size: .75rem; }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: 3px; margin: 0 .4rem -.05rem 0; background: var(--before); } .key.a { background: var(--after); }
.key.train, .key.held { height: .2rem; width: 1.1rem; margin-bottom: .25rem; background: var(--train); } .key.held { background: var(--held); }
.key.raw { height: .2rem; width: 1.1rem; margin-bottom: .25rem; background: #c3d3e6; } .key.mark { width: 0; height: .9rem; border-left: 2px dashed var(--soft); border-radius: 0; background: none; margin-bottom: -.1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .55rem .7rem; text-align: center; } th { font-weight: 600; background: #f8fafc; font-size: .88rem; }
td b { font-size: 1.35rem; display: block; line-height: 1.2; } td.good { background: #e8f4f1; color: var(--good); } td.bad { background: #fbeceb; color: var(--bad); }
.pairs { table-layout: fixed; } .pairs th:first-child { width: 28%; } .whole { break-inside: avoid; }
.facts { table-layout: fixed; } .facts th:first-child { width: 10rem; } .facts td, .facts th { text-align: left; vertical-align: top; overflow-wrap: anywhere; font-size: .88rem; }
.curve { display: grid; grid-template-columns: 2.9rem 1fr; margin: .2rem 0 0 -.3rem; } .curve svg { height: 15rem; overflow: visible; }
.curve text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.card-facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: .8rem 1.5rem; margin: 1.2rem 0 0; }
.card-facts dt { color: var(--soft); font-size: .8rem; } .card-facts dd { margin: 0; font-size: .95rem; line-height: 1.4; overflow-wrap: anywhere; } .card-facts dd small { color: var(--soft); font-size: .82rem; display: block; }
.cards { list-style: none; padding: 0; margin: .9rem 0 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: .9rem; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .8rem; display: flex; gap: .9rem; break-inside: avoid; min-width: 0; }
.card.strip { flex-direction: column; gap: .65rem; } .told { min-width: 0; flex: 1; }
.shots { flex: none; width: 7.5rem; } .shots img, .gone { display: block; width: 100%; border-radius: 7px; background: var(--ground); }
.shots img { height: auto; max-height: 10rem; object-fit: contain; }
.strip .shots { width: 100%; display: grid; grid-template-columns: repeat(4, 1fr); gap: .45rem; } .strip .shots img { aspect-ratio: 1; height: 100%; } .strip .shots .soft { grid-column: 1 / -1; font-size: .78rem; }
.gone { aspect-ratio: 1; border: 1px dashed #c3ccd6; color: var(--soft); font-size: .75rem; line-height: 1.35; padding: .4rem; display: flex; flex-direction: column; justify-content: center; text-align: center; overflow-wrap: anywhere; overflow: hidden; }
.question small { font-weight: 400; color: var(--soft); } .question { font-weight: 600; line-height: 1.45; overflow-wrap: anywhere; margin: 0 0 .4rem; } .id { color: var(--soft); font-weight: 400; font-size: .75rem; overflow-wrap: anywhere; margin: .4rem 0 0; line-height: 1.3; }
.answers { display: grid; grid-template-columns: max-content 1fr; gap: .12rem .8rem; margin: 0; line-height: 1.45; font-size: .95rem; } .answers dt { color: var(--soft); font-size: .84rem; padding-top: .08rem; }
.answers dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; } .good { color: var(--good); } .bad { color: var(--bad); } .answers small { color: var(--soft); }
.answers dd.good::before, .list .good::before { content: "✓ "; } .answers dd.bad::before, .list .bad::before { content: "✗ "; }
details { margin-top: 1rem; border-top: 1px solid var(--line); padding-top: .8rem; } summary { cursor: pointer; color: var(--soft); font-size: .92rem; } summary:hover { color: var(--ink); }
.list th, .list td { text-align: left; vertical-align: top; font-size: .86rem; overflow-wrap: anywhere; padding: .4rem .6rem; } .list { margin-top: .7rem; table-layout: fixed; } .list td { background: none; } .list th { width: 20%; } .list th:first-child, .list th:nth-child(2) { width: 32%; } .list th:last-child { width: 16%; }
@media (max-width: 40rem) { main { padding: 1.1rem .7rem 2rem; } section { padding: 1rem; } .also { margin: 1rem -1rem -1rem; padding: .7rem 1rem .8rem; }
  .change { margin-left: 0; text-align: left; flex-basis: 100%; } .number b { font-size: 2rem; } .arrow { font-size: 1.3rem; margin-top: 1.5rem; } .hero { gap: .7rem .9rem; }
  .row { grid-template-columns: 1fr auto; } .row svg { grid-column: 1 / -1; grid-row: 2; } .curve svg { height: 12rem; } .card { display: grid; grid-template-columns: 6.25rem 1fr; gap: .5rem .8rem; align-items: start; } .told { display: contents; } .shots { width: auto; } .question { margin: 0; grid-column: 1 / -1; } .card:not(.strip) .shots + .told .question { grid-column: 2; }
  .strip .shots, .answers, .id { grid-column: 1 / -1; } .id { margin: 0; } .card-facts { grid-template-columns: 1fr 1fr; gap: .7rem 1rem; }
  .facts, .facts tbody, .facts tr, .facts th, .facts td, .list, .list tbody, .list tr, .list td { display: block; } .facts th:first-child { width: auto; } .facts thead, .list thead { display: none; }
  .facts th, .facts td, .list td { border-width: 0; padding: .15rem .1rem; } .facts th { background: none; color: var(--soft); font-weight: 400; } .facts tr, .list tr { border-top: 1px solid var(--line); padding: .45rem 0; }
  .facts td[data-side]::before, .list td[data-side]::before { content: attr(data-side) "  "; color: var(--soft); font-size: .8rem; }
  .list td.good[data-side]::before { content: attr(data-side) "  ✓ "; } .list td.bad[data-side]::before { content: attr(data-side) "  ✗ "; } }
@media print { @page { margin: 13mm 12mm; } html { font-size: 12px; } body { background: #fff; font-size: 1rem; } section { border-color: #ccc; padding: .9rem 1rem; } main { max-width: none; padding: 0; } .also { margin: .9rem -1rem -.9rem; padding: .6rem 1rem .7rem; }
  svg, td, .banner, .key, img, .also { print-color-adjust: exact; -webkit-print-color-adjust: exact; } .cards { grid-template-columns: 1fr 1fr; gap: .6rem; } .card { padding: .6rem; gap: .6rem; } .shots { width: 5.6rem; } .curve svg { height: 12rem; } .card-facts { grid-template-columns: repeat(3, 1fr); } details { break-before: avoid; border: 0; padding: 0; margin-top: .6rem; } }
"""
