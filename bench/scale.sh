# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# Many more busy buffers than workers: all of one owner, each with something
# counted several times in its interval of a second, and four workers that
# share them.  How many flushes there are in a second, and how late the latest
# key is.

scale_count_all_the_time() {
	while [ -e "$work/counting" ]; do
		perform "SELECT count(sb_increment('key', 1, buffer)) FROM scale_buffers" || return
		echo >>"$work/counted"
		sleep 0.2
	done
}

# How many seconds the key that is due longest has waited.
scale_latest() {
	ask "SELECT greatest(0, extract(epoch FROM clock_timestamp() - min(oldest_due))) FROM sb_stat_buffers"
}

scale_flushed() {
	ask "SELECT sum(flushed_keys) FROM sb_stat_buffers"
}

scale_run() { # BUFFERS
	local n=$1 window=15 counter began before latest=0 i sum
	[ -z "$quick" ] || window=1
	bench_server "scale-$n" "statbuffer.max_workers = 4"
	load scale.sql buffers="$n"
	rm -f "$work/counted"
	touch "$work/counting"
	scale_count_all_the_time &
	counter=$!
	# until they have found their pace
	sleep $((window / 2))
	began=$(date +%s%N)
	before=$(scale_flushed)
	for ((i = 0; i < 2 * window; i++)); do
		latest=$(awk -v a="$latest" -v b="$(scale_latest)" 'BEGIN { print (b > a ? b : a) }')
		sleep 0.5
	done
	record flushes statbuffer "$n" 'flushes/s' \
		"$(awk -v n=$(($(scale_flushed) - before)) -v ns=$(($(date +%s%N) - began)) 'BEGIN { print n / ns * 1e9 }')"
	record latest statbuffer "$n" s "$latest"
	rm "$work/counting"
	wait "$counter" || die "$group: counting failed"

	must_be "buffers that were not drained" 0 "SELECT count(*) FROM scale_buffers WHERE NOT sb_drain(buffer, '5min')"
	sum=$(($(wc -l <"$work/counted") * n))
	must_be "what is stored" "$sum" "SELECT sum(n) FROM scale_stored"
	must_be "what they have flushed" "$sum" "SELECT sum(flushed_count) FROM sb_stat_buffers"
	stop_server
}

measure_scale() {
	local n
	for n in $([ -n "$quick" ] && echo 30 || echo 1000 5000); do
		scale_run "$n"
	done
}
