//! Divergence against size, as SVG.

use super::Manifest;
use anyhow::{Result, anyhow};
use plotters::prelude::*;

const SIZE: (u32, u32) = (760, 480);
/// Height of a label, pixels.
const LINE: i32 = 14;
const INK: RGBColor = RGBColor(40, 44, 52);
const POINT: RGBColor = RGBColor(31, 98, 185);

/// Draws `m`'s files, joined where no smaller one is better; the axis of divergences is logarithmic.
pub fn svg(m: &Manifest) -> Result<String> {
    let mut out = String::new();
    draw(m, &mut out).map_err(|e| anyhow!("the plot cannot be drawn: {e}"))?;
    Ok(out)
}

fn draw(m: &Manifest, out: &mut String) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let most = m.files.iter().map(|f| f.bytes).max().unwrap_or(1);
    let (unit, name) = if most >= 2_000_000_000 { (1e9, "GB") } else { (1e6, "MB") };
    let mut points: Vec<(f64, f64, &str)> =
        m.files.iter().map(|f| (f.bytes as f64 / unit, f.divergence.max(1e-7), f.kind.as_str())).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let span = |values: &mut dyn Iterator<Item = f64>| values.fold((f64::MAX, f64::MIN), |(lo, hi), v| (lo.min(v), hi.max(v)));
    let (left, right) = span(&mut points.iter().map(|p| p.0));
    let (low, high) = span(&mut points.iter().map(|p| p.1));
    // Room for labels at the right.
    let margin = ((right - left) * 0.12).max(right * 0.03);

    let root = SVGBackend::with_string(out, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{}: divergence against size", m.name), ("sans-serif", 20).into_font().color(&INK))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(76)
        .build_cartesian_2d(left - margin..right + 2.0 * margin, (low / 1.6..high * 1.6).log_scale())?;
    let digits = if right < 100.0 { 1 } else { 0 };
    chart
        .configure_mesh()
        .max_light_lines(1)
        .y_labels(14)
        .x_desc(format!("file size, {name}"))
        .y_desc("mean KL divergence, nats")
        .x_label_formatter(&|x| format!("{x:.digits$}"))
        .y_label_formatter(&|y| significant(*y))
        .label_style(("sans-serif", 13).into_font().color(&INK))
        .axis_desc_style(("sans-serif", 14).into_font().color(&INK))
        .light_line_style(RGBColor(240, 240, 240))
        .bold_line_style(RGBColor(222, 222, 222))
        .draw()?;
    chart.draw_series(LineSeries::new(frontier(&points), POINT.mix(0.35).stroke_width(2)))?;
    chart.draw_series(points.iter().map(|p| Circle::new((p.0, p.1), 5, POINT.filled())))?;
    let style = ("sans-serif", 14).into_font().color(&INK);
    // Where the last label ends, in pixels; the next one goes below its point if it would run into it.
    let mut last = (0, 0);
    for (x, y, label) in &points {
        let at = chart.backend_coord(&(*x, *y));
        let below = at.0 < last.0 && (at.1 - last.1).abs() < LINE;
        let offset = if below { (-4, 9) } else { (9, -LINE) };
        last = if below { last } else { (at.0 + 12 + 8 * label.len() as i32, at.1) };
        chart.draw_series([EmptyElement::at((*x, *y)) + Text::new(label.to_string(), offset, style.clone())])?;
    }
    root.present()?;
    Ok(())
}

/// The points that no smaller file is better than.
fn frontier(points: &[(f64, f64, &str)]) -> Vec<(f64, f64)> {
    let mut best = f64::INFINITY;
    points
        .iter()
        .filter(|p| {
            let better = p.1 < best;
            best = best.min(p.1);
            better
        })
        .map(|p| (p.0, p.1))
        .collect()
}

/// Without an exponent: 0.0045, 0.00017.
fn significant(y: f64) -> String {
    let digits = (1.0 - y.log10().floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{y:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}
