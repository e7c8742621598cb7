# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# The worst that a client meets while others read a buffer of a million keys:
# eight clients count random keys of it, with and without a session that
# selects from it all the time.

stall_clients=8

select_all_the_time() {
	while [ -e "$work/selecting" ]; do
		ask "SELECT sum(count) FROM hits" >>"$work/selected"
	done
}

# stall_run WHO
stall_run() {
	local log=$work/log/stall-$round-$1 reader=
	if [ "$1" = select ]; then
		touch "$work/selecting"
		select_all_the_time &
		reader=$!
	fi
	run_pgbench "$stall_clients" -f "$root/bench/increment_uniform.pgbench" -D keys="$million" -l --log-prefix="$log"
	if [ -n "$reader" ]; then
		rm "$work/selecting"
		wait "$reader" || die "$group: selecting failed"
	fi
	stalled=$((stalled + ntransactions))
	# the first transactions of a session load what it needs
	cat "$log".* | awk '$2 > 5 { print $3 }' | sort -n >"$work/sorted"
	record p99 "$1" "$stall_clients" ms "$(awk '{ v[NR] = $1 } END { print v[int(NR * 0.99) + 1] / 1000 }' "$work/sorted")"
	record worst "$1" "$stall_clients" ms "$(awk '{ v = $1 } END { print v / 1000 }' "$work/sorted")"
	rm "$log".*
}

stall_round() {
	local who
	while read -r who; do
		stall_run "$who"
	done < <(in_turn none select)
}

measure_stall() {
	local stalled=$million rounds=$few
	bench_server stall
	perform "ALTER FOREIGN TABLE hits OPTIONS (SET interval '1h')"
	perform "INSERT INTO hits SELECT 'key ' || n, 1 FROM generate_series(1, $million) AS n"
	each_round stall_round
	must_have_counted hits "$stalled"
	must_be "the buffer's own sum" "$stalled" "SELECT sum(count) FROM hits"
	# what was seen on the way cannot have gone down, or beyond the end
	sort -n -c "$work/selected" || die "$group: a later reader saw less"
	[ "$(tail -n 1 "$work/selected")" -le "$stalled" ] || die "$group: a reader saw more than there was"
	perform "TRUNCATE hits"
	stop_server
}
