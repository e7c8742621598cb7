# How cost grows; reads growth.csv, writes growth.png.

set terminal pngcairo size 1040,460 font 'DejaVu Sans,11'
set output 'growth.png'
set datafile separator ','
set encoding utf8
set multiplot layout 1,3 title 'How cost grows' font ',15' margins 0.06,0.98,0.14,0.78 spacing 0.075,0
set logscale x
set format x '10^{%L}'
set grid lt 1 lw 0.7 lc rgb '#dddddd'
set border 3
set tics nomirror
set key top left Left reverse samplen 1.5 spacing 1.2
of(what, who) = strcol(1) eq what && strcol(2) eq who

set title "ns for an increment of a random key,\nabove the no-op's" font ',11'
set xlabel 'keys held'
set yrange [0:*]
plot 'growth.csv' using (of('held', 'difference') ? $3 : NaN):5:6:7 with yerrorlines lw 2 pt 7 lc rgb '#d62728' notitle

set title "µs for each key of a flush,\narray handler" font ',11'
set xlabel 'keys due'
set logscale y
set yrange [*:*]
set format y '%g'
plot 'growth.csv' using (of('due', 'statbuffer') ? $3 : NaN):($5 * 1000 / $3):($6 * 1000 / $3):($7 * 1000 / $3) with yerrorlines lw 2 pt 7 lc rgb '#d62728' notitle

set title "µs for a transaction,\nits commit included" font ',11'
set xlabel 'different keys in it'
plot 'growth.csv' using (of('keys', 'statbuffer') ? $3 : NaN):5:6:7 with yerrorlines lw 2 pt 7 lc rgb '#d62728' title 'statbuffer', \
	'' using (of('keys', 'no-op') ? $3 : NaN):5:6:7 with yerrorlines lw 2 pt 6 lc rgb '#7f7f7f' title 'no-op'
