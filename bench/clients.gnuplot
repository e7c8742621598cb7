# Transactions a second, by clients; reads clients.csv, writes clients.png.

set terminal pngcairo size 960,600 font 'DejaVu Sans,12'
set output 'clients.png'
set datafile separator ','
set encoding utf8
set label 1 'Increments of one key, each a transaction of its own' at screen 0.5,0.955 center font ',15'
set tmargin 4
set xlabel 'clients'
set ylabel 'increments a second (logarithmic)'
set logscale xy
set format y '%.0s%c'
set xtics (1, 8, 64, 256)
set xrange [0.85:300]
set yrange [100:200000]
set grid ytics xtics lt 1 lw 0.7 lc rgb '#dddddd'
set border 3
set tics nomirror
set key outside right center Left reverse spacing 1.5 samplen 2 width -2

plot 'clients.csv' using 1:10 with linespoints lw 2 pt 13 lc rgb '#8c564b' title 'Redis INCR', \
	'' using 1:2 with linespoints lw 2 pt 6 ps 1.6 lc rgb '#7f7f7f' title 'no-op function', \
	'' using 1:3 with linespoints lw 3 pt 7 lc rgb '#d62728' title 'statbuffer', \
	'' using 1:9 with linespoints lw 2 pt 4 lc rgb '#bcbd22' title 'nextval', \
	'' using 1:5 with linespoints lw 2 pt 8 lc rgb '#1f77b4' title 'UPDATE, unlogged table', \
	'' using 1:6 with linespoints lw 2 pt 10 lc rgb '#17becf' title 'UPDATE, commit not waited for', \
	'' using 1:8 with linespoints lw 2 pt 12 lc rgb '#2ca02c' title 'INSERT and roll-up', \
	'' using 1:7 with linespoints lw 2 pt 14 lc rgb '#9467bd' title 'UPDATE of one of 64 rows', \
	'' using 1:4 with linespoints lw 2 pt 5 lc rgb '#000000' title 'UPDATE of a row'
