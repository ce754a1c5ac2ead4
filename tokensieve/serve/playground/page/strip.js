// The context as a strip: where in it the attention went, and which part of it is in sight.

import { ONLY_DENSE } from "./shares.js";

export class Strip {
  /** jump: called with the position that the reader points at. */
  constructor(canvas, jump) {
    this.canvas = canvas;
    const point = (event) => {
      const { left, width } = canvas.getBoundingClientRect();
      const share = Math.min(Math.max((event.clientX - left) / width, 0), 1);
      if (this.context) jump(Math.min(Math.floor(share * this.context), this.context - 1));
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      point(event);
    });
    // keeps the focus on the token that was jumped to
    canvas.addEventListener("mousedown", (event) => event.preventDefault());
    canvas.addEventListener("pointermove", (event) => event.buttons && point(event));
  }

  load(context) {
    this.context = context;
  }

  /** visible: the first and the last token that are in sight. */
  draw({ values, kinds, coloured }, visible) {
    const { canvas, context } = this;
    const scale = devicePixelRatio || 1;
    const width = (canvas.width = Math.round(canvas.clientWidth * scale));
    const height = (canvas.height = Math.round(canvas.clientHeight * scale));
    if (!width || !context) return;
    const wide = 2 * scale; // a column's width, in pixels of the canvas
    const columns = Math.ceil(width / wide);
    const sums = [new Float64Array(columns), new Float64Array(columns)];
    for (const position of coloured) {
      const column = Math.floor((position / context) * columns);
      sums[kinds[position] === ONLY_DENSE ? 1 : 0][column] += values[position];
    }
    const most = Math.max(...sums[0], ...sums[1]);
    const style = getComputedStyle(canvas);
    const pen = canvas.getContext("2d");
    pen.fillStyle = style.getPropertyValue("outline-color"); // frames what is in sight
    const [from, to] = visible.map((position) => (position / context) * width);
    pen.fillRect(from, 0, Math.max(to - from, 3 * scale), height);
    [style.color, style.getPropertyValue("caret-color")].forEach((colour, kind) => {
      pen.fillStyle = colour;
      sums[kind].forEach((sum, column) => {
        if (!sum) return;
        const tall = Math.max(Math.sqrt(sum / most) * height, scale);
        pen.fillRect(column * wide, height - tall, wide, tall);
      });
    });
  }
}
