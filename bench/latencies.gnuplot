# Latency of commits with and without a flush; reads latencies.csv, writes
# latencies.png.

set terminal pngcairo size 1040,480 font 'DejaVu Sans,11'
set output 'latencies.png'
set datafile separator ','
set multiplot layout 1,2 title 'Latency of a transaction that counts: 8 clients, and a flush of 100,000 keys' \
	font ',15' margins 0.075,0.985,0.14,0.84 spacing 0.09,0
set logscale xy
set yrange [0.03:100]
# how many of so many are slower
set xrange [1.5:2e4]
set xtics ('50' 2, '90' 10, '99' 100, '99.9' 1000, '99.99' 10000)
set xlabel 'per cent of the transactions are faster'
set format y '%g'
set grid lt 1 lw 0.7 lc rgb '#dddddd'
set border 3
set tics nomirror
set key top left Left reverse samplen 1.5 spacing 1.2
of(load, flush) = strcol(1) eq load && strcol(2) eq flush && $3 < 100

set ylabel 'ms'
set title 'clients as fast as they can' font ',11'
plot 'latencies.csv' using (of('busy', 'with') ? 100 / (100 - $3) : NaN):($4 / 1000) with linespoints lw 2 pt 7 lc rgb '#d62728' title 'while flushing', \
	'' using (of('busy', 'without') ? 100 / (100 - $3) : NaN):($4 / 1000) with linespoints lw 2 pt 6 lc rgb '#7f7f7f' title 'otherwise'

unset ylabel
set title '5,000 transactions a second' font ',11'
plot 'latencies.csv' using (of('room', 'with') ? 100 / (100 - $3) : NaN):($4 / 1000) with linespoints lw 2 pt 7 lc rgb '#d62728' title 'while flushing', \
	'' using (of('room', 'without') ? 100 / (100 - $3) : NaN):($4 / 1000) with linespoints lw 2 pt 6 lc rgb '#7f7f7f' title 'otherwise'
