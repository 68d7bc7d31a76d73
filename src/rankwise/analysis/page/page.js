"use strict";
const plots = document.querySelectorAll(".plot");
const config = {responsive: true, displayModeBar: false, displaylogo: false, scrollZoom: false};
// On a touch screen a drag must scroll the page; with a mouse it zooms, and a double click undoes that.
const dragmode = window.matchMedia("(pointer: fine)").matches ? "zoom" : false;
for (const plot of plots) {
  const {data, layout} = JSON.parse(plot.nextElementSibling.textContent);
  Plotly.newPlot(plot, data, {...layout, dragmode}, config);
}
const resize = () => plots.forEach((plot) => Plotly.Plots.resize(plot));
window.addEventListener("beforeprint", resize);
window.addEventListener("afterprint", resize);
// Details are opened for paper, where nobody can click.
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
