"""The derivative's launches, group of heads by group, in their order."""

# With a solve there are x, H and the adjoint's arrays; the types do not tell.
# pyright: reportArgumentType=false

from math import prod

import torch
from torch import Tensor

from gka.kernels.adjoint import readout_backward_kernel, through_h_kernel, through_u_kernel
from gka.kernels.arrays import Adjoint, Ends, Heads, Maxima, Moments
from gka.kernels.call import Launch
from gka.kernels.hopper import calls as hopper
from gka.kernels.reverse import reverse_h_kernel, reverse_u_kernel
from gka.maths.adjoint import Gradients


class Backward:
    """The caller's gradients and the order in which a group of heads adds its part to them."""

    def __init__(self, run: Launch, x, x_scale, do: Tensor, dh_final, du_final) -> None:
        self.run, self.x, self.x_scale, self.do = run, x, x_scale, do
        self.dh_final, self.du_final = dh_final, du_final
        self.with_h = run.solve or dh_final[0] is not None
        t = run.t
        run.signature = (*run.signature, do.dtype, dh_final[0] is None, du_final[0] is None)
        self.dq, self.dk, self.dv = (torch.empty_like(x) for x in (t.q, t.k, t.v))
        self.dg_u, self.dbeta2, self.dalpha = run.like(t.g), run.like(t.beta), run.like(t.alpha)
        self.dg_h = run.like(run.gk)
        if self.dalpha is not None and not run.solve:
            self.dalpha.zero_()
        if self.dg_h is not None and not self.with_h:
            self.dg_h.zero_()
        self.du0 = None if t.u0 is None else run.empty(*t.u0.shape)
        self.dh0 = None if t.h0 is None or not self.with_h else run.empty(*t.h0.shape)

    def through(self, heads: Heads) -> None:
        """All of a group's gradients."""
        run = self.run
        maxima = run.maxima(heads)
        h, u = run.moments(heads, self.with_h, maxima)
        start_u = run.scratch("start u", *run.t.q.shape[:2], heads.count)
        adjoint = self._adjoint(heads)
        if run.hopper:
            solutions, grads = (self.x, self.x_scale), (self.dq, self.dalpha)
            hopper.adjoint(run, heads, h, u, solutions, self.do, grads, adjoint, start_u)
        else:
            self._readout(heads, u, start_u, adjoint)
        dk, dv = self._shared_heads(heads)
        if run.hopper:
            self._on_hopper(heads, h, u, maxima, adjoint, start_u, (dk[0], dv[0]))
        else:
            self._through_u(heads, u, maxima, start_u, dk, dv)
            if h is not None:
                self._through_h(heads, h, maxima, adjoint, dk)
        for grad, part, of in ((self.dk, dk, run.HK), (self.dv, dv, run.HV)):
            if of < run.H:
                first, share = heads.base * of // run.H, run.H // of
                shape = (*grad.shape[:2], heads.count // share, share, grad.shape[-1])
                total = part[0].view(-1)[: prod(shape)].view(shape).sum(3)
                grad[:, :, first : first + heads.count // share] = total

    def _adjoint(self, heads: Heads) -> Adjoint | None:
        run = self.run
        if not run.solve:
            return None
        shape = (*run.t.q.shape[:2], heads.count)
        y_scale, w_t, start_h, key_weight = (run.scratch(f"adjoint {i}", *shape) for i in range(4))
        fro = None if run.hopper else run.scratch("fro", *shape)
        y = run.scratch("y", *shape, run.K, dtype=run.op_dtype)
        start_weight = run.scratch("start weight", run.M, heads.count)
        return Adjoint(y, y_scale, w_t, fro, start_h, key_weight, start_weight)

    def _shared_heads(self, heads: Heads):
        """Where dk and dv go: (array, first head, heads); scratch where heads share, summed afterwards."""
        run = self.run
        places = []
        for grad, name, of in ((self.dk, "dk", run.HK), (self.dv, "dv", run.HV)):
            if of == run.H:
                places.append((grad, heads.base, run.H))
            else:
                shape = (*run.t.q.shape[:2], heads.count, grad.shape[-1])
                places.append((run.scratch(name, *shape), 0, heads.count))
        return places

    def _readout(self, heads: Heads, u: Moments, start_u: Tensor, adjoint: Adjoint | None) -> None:
        run, t = self.run, self.run.t
        dx = (None, None) if adjoint is None else (adjoint.y, adjoint.y_scale)
        args = (
            t.q, self.x, self.x_scale, t.k, t.v, t.g, t.alpha, t.beta, self.do, *u.stored, *dx, self.dq,
            self.dalpha, start_u, *run.tables, run.settings.scale,
        )  # fmt: skip
        grid = (run.M * heads.count,)
        run.launch(readout_backward_kernel, "readout_backward", grid, heads, args)

    def _on_hopper(
        self, heads: Heads, h: Moments | None, u: Moments, maxima: Maxima, adjoint: Adjoint | None,
        start_u: Tensor, grads: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        """Both reverse scans and the gradients through both moments; E of U takes the place of U."""
        assert h is not None and adjoint is not None and self.x is not None
        run, x = self.run, (self.x, self.x_scale)
        ends = self._ends(heads, "h"), self._ends(heads, "u", u.states)
        edges = (self.dh_final, self.dh0), (self.du_final, self.du0)
        sums = (
            run.sums(heads, "h", run.K, run.NK, True),
            run.sums(heads, "u", run.V, run.NV, True),
        )
        hopper.scan_back(run, heads, (h, u), ends, edges, sums, x, self.do, adjoint, maxima)
        tokens = {
            "d_o": self.do, "y": adjoint.y, "y_scale": adjoint.y_scale, "w": adjoint.w_t,
            "key_weight": adjoint.key_weight, "start_u": start_u, "start_h": adjoint.start_h,
        }  # fmt: skip
        out = {
            "dk": grads[0], "dv": grads[1], "dg": self.dg_u, "dgk": self.dg_h, "d_beta2": self.dbeta2,
        }  # fmt: skip
        hopper.gradients(run, heads, h, ends, maxima, x, tokens, out)

    def _through_u(self, heads: Heads, u: Moments, maxima: Maxima, start_u: Tensor, dk, dv) -> None:
        run, t = self.run, self.run.t
        ends = self._ends(heads, "")
        read = (t.q, self.x, self.x_scale, t.alpha, self.do, t.g, *u.stored, *self.du_final)
        sums = run.sums(heads, "u", run.V, run.NV, True)
        written = (*ends.stored, maxima.z, maxima.d, self.du0)
        factor = run.settings.scale
        self._scan(reverse_u_kernel, heads, run.NV, read, written, sums, "reverse_u", factor)
        args = (
            t.q, self.x, self.x_scale, t.k, t.v, t.g, t.alpha, t.beta, self.do, *ends.stored, start_u,
            maxima.k, maxima.v, maxima.z, maxima.d, dk[0], dv[0], self.dg_u, self.dbeta2, *run.tables,
            run.settings.scale, *dk[1:], *dv[1:],
        )  # fmt: skip
        run.launch(through_u_kernel, "through_u", (run.M * heads.count,), heads, args)

    def _through_h(
        self, heads: Heads, h: Moments, maxima: Maxima, adjoint: Adjoint | None, dk
    ) -> None:
        run, t, a = self.run, self.run.t, adjoint
        x, of_tokens, of_scan = (None, None), (None,) * 6, (None,) * 6
        if a is not None:
            x, y = (self.x, self.x_scale), (a.y, a.y_scale)
            numbers = (a.w_t, a.fro, a.start_h, a.key_weight)
            run.solve_(heads, y, h, y, *x, self.dq, *numbers, a.start_weight)
            of_tokens = (*y, *numbers)
            of_scan = (*y, t.k, maxima.k, a.key_weight, a.start_weight)
        ends = self._ends(heads, "")  # the memory of E of U, which is done with
        sums = run.sums(heads, "h", run.K, run.NK, True)
        read = (*x, *of_scan, run.gk, *h.stored, *self.dh_final)
        written = (*ends.stored, self.dh0)
        self._scan(reverse_h_kernel, heads, run.NK, read, written, sums, "reverse_h")
        args = (
            *x, *of_tokens, t.k, run.gk, t.beta, *h.stored, h.norms, *ends.stored, maxima.k, dk[0],
            self.dg_h, self.dbeta2, *run.tables, *dk[1:],
        )  # fmt: skip
        grid = (run.M * heads.count,)
        run.launch(through_h_kernel, "through_h", grid, heads, args, SOLVE=run.solve)

    def _ends(self, heads: Heads, name: str, states: Tensor | None = None) -> Ends:
        """Memory for E of either state, in the place of `states` if given; one name is one memory."""
        run, shape = self.run, (self.run.M, heads.count)
        width, blocks = max(run.K, run.V), max(run.NK, run.NV)
        if states is None:
            states = run.scratch(f"{name} ends", *shape, run.K, width, dtype=run.op_dtype)
        scales, wholes = (
            run.scratch(f"{name} {of}", *shape, blocks) for of in ("end scales", "wholes")
        )
        return Ends(states, scales, wholes)

    def _scan(
        self, kernel, heads: Heads, blocks: int, read, written, sums, name: str, *factor
    ) -> None:
        """Both passes of a reverse scan."""
        run = self.run
        programs = (run.chunks.num_segments * heads.count, blocks)
        args = (*read, *written, *sums, *run.segments, *factor)
        if run.chunks.segmented:
            run.launch(kernel, name, programs, heads, args, SUM=True)
        run.launch(kernel, name, programs, heads, args, SUM=False)

    def collect(self) -> Gradients:
        """Gradients in their inputs' dtypes."""
        t, dg_u, dg_h = self.run.given, self.dg_u, self.dg_h
        if self.run.settings.tied and dg_u is not None and dg_h is not None:
            dg_u += dg_h
        dbeta = None
        if self.dbeta2 is not None and t.beta is not None:
            dbeta = self.dbeta2.mul_(t.beta).mul_(2.0)
        dh0 = self.dh0
        if dh0 is not None:  # H is symmetric, and so is its gradient
            dh0 = (dh0 + dh0.transpose(-1, -2)) / 2
        elif t.h0 is not None:
            dh0 = torch.zeros_like(t.h0)

        def cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
            return None if like is None or grad is None else grad.to(like.dtype)

        return Gradients(
            q=self.dq,
            k=self.dk,
            v=self.dv,
            g=cast(dg_u, t.g),
            gk=cast(dg_h, t.gk),
            alpha=cast(self.dalpha, t.alpha),
            beta=cast(dbeta, t.beta),
            h0=cast(dh0, t.h0),
            u0=cast(self.du0, t.u0),
        )
