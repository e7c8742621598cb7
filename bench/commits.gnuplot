# Commits of others while a buffer grows; reads commits.csv and, if it is there,
# commits-dshash.csv, which is of core's hash table that we had before; writes
# commits.png.

set terminal pngcairo size 1040,480 font 'DejaVu Sans,11'
set output 'commits.png'
set datafile separator ','
set encoding utf8
set multiplot layout 1,2 title 'While a session makes keys, one by one' \
	font ',15' margins 0.07,0.985,0.14,0.84 spacing 0.09,0
set logscale y
set yrange [0.1:10000]
set xrange [0:5.2]
set xlabel 'million keys held'
set ylabel 'ms'
set format y '%g'
set grid lt 1 lw 0.7 lc rgb '#dddddd'
set border 3
set tics nomirror
set key top left Left reverse samplen 2 spacing 1.2
of(what, figure) = strcol(1) eq what && strcol(2) eq figure
before = system("test -e commits-dshash.csv && echo 1 || echo 0") + 0
files = before ? 'commits-dshash.csv commits.csv' : 'commits.csv'
color(file) = file eq 'commits.csv' ? 0xd62728 : 0x7f7f7f
label(file) = file eq 'commits.csv' ? '' : ', with dshash (before)'

set title 'commits of four others in the same buffer' font ',11'
plot for [file in files] file using (of('commit-growing', 'worst') ? $3 / 1e6 : NaN):4 with linespoints lw 2 pt 7 lc rgb color(file) \
		title 'the worst'.label(file), \
	for [file in files] file using (of('commit-growing', 'p99.9') ? $3 / 1e6 : NaN):4 with linespoints lw 1.5 dt 2 pt 6 lc rgb color(file) \
		title '99.9 % are faster'.label(file)

unset ylabel
set title 'the longest call that makes a key' font ',11'
plot for [file in files] file using (of('call-growing', 'worst') ? $3 / 1e6 : NaN):4 with linespoints lw 2 pt 7 lc rgb color(file) \
	title 'the worst'.label(file)
