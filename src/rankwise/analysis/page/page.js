"use strict";
const plots = document.querySelectorAll(".plot");
const config = {responsive: true, displayModeBar: false, displaylogo: false, scrollZoom: false};
// On a touch screen a drag must scroll the page; with a mouse it zooms, and a double click undoes that.
const dragmode = window.matchMedia("(pointer: fine)").matches ? "zoom" : false;
const draw = (plot) => {
  const {data, layout} = JSON.parse(plot.nextElementSibling.textContent);
  Plotly.newPlot(plot, data, {...layout, dragmode}, config);
};
// One after the other, each as a task of its own: the page can be read and scrolled before the last is drawn.
const waiting = [...plots];
const drawNext = () => { if (waiting.length) { setTimeout(drawNext); draw(waiting.shift()); } };  // also after one fails
setTimeout(drawNext);
// On paper all are to be seen.
window.addEventListener("beforeprint", () => waiting.splice(0).forEach(draw));
const resize = () => plots.forEach((plot) => Plotly.Plots.resize(plot));
window.addEventListener("beforeprint", resize);
window.addEventListener("afterprint", resize);
// Details are opened for paper, where nobody can click.
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
