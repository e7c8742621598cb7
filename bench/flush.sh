# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# What a flush costs over the same work by hand: 100,000 keys that are held in
# a buffer, against the same keys in a table, brought into a table that has
# none of them (empty) or all of them (full).
#
# By hand is a procedure that commits as often as the worker does, and takes
# the keys in the order in which the worker does: batches as the keys were
# counted, sorted in themselves.

# flush_reset CASE: the target as the case has it.
flush_reset() {
	perform "TRUNCATE stored"
	[ "$1" = empty ] || perform "INSERT INTO stored SELECT key, 1 FROM source"
	perform "VACUUM ANALYZE stored"
	perform "CHECKPOINT"
}

flush_check() {
	local expected=$hundred_thousand
	[ "$1" = empty ] || expected=$((2 * hundred_thousand))
	must_be "what $2 has stored" "$hundred_thousand $expected" "SELECT count(*) || ' ' || sum(n) FROM stored"
}

# The worker is up, as it is while a buffer is in use.
flush_by_worker() { # BUFFER
	perform "INSERT INTO $1 SELECT key, 1 FROM source ORDER BY id"
	milliseconds "SELECT sb_drain('$1')"
}

flush_run() { # CASE WHO
	flush_reset "$1"
	local ms
	case $2 in
	target) ms=$(flush_by_worker target_hits) ;;
	target-in-one) ms=$(flush_by_worker target_in_one_hits) ;;
	array) ms=$(flush_by_worker array_hits) ;;
	array-in-one) ms=$(flush_by_worker array_in_one_hits) ;;
	one) ms=$(flush_by_worker one_hits) ;;
	upsert) ms=$(milliseconds "CALL upsert_by_hand($hundred_thousand, 1000)") ;;
	upsert-in-one) ms=$(milliseconds "CALL upsert_by_hand($hundred_thousand, $hundred_thousand)") ;;
	loop) ms=$(milliseconds "CALL loop_by_hand($hundred_thousand, 1000)") ;;
	loop-of-calls) ms=$(milliseconds "CALL call_by_hand($hundred_thousand, 1000)") ;;
	esac
	record "$1" "$2" "$hundred_thousand" ms "$ms"
	flush_check "$1" "$2"
}

flush_round() {
	local what who
	for what in empty full; do
		while read -r who; do
			flush_run "$what" "$who"
		done < <(in_turn target array upsert target-in-one array-in-one upsert-in-one one loop loop-of-calls)
	done
}

measure_flush() {
	local buffer buffers=(target_hits target_in_one_hits array_hits array_in_one_hits one_hits) rounds=$few
	bench_server flush "shared_buffers = '512MB'" "shared_preload_libraries = 'statbuffer'"
	load flush.sql keys="$hundred_thousand"
	for buffer in "${buffers[@]}"; do
		perform "SELECT sb_increment('first', 1, '$buffer')"
		drain "$buffer"
	done

	each_round flush_round

	for buffer in "${buffers[@]}"; do
		must_have_counted "$buffer" $((2 * rounds * hundred_thousand + 1))
		must_be "what $buffer holds" 0 "SELECT count(*) FROM $buffer"
	done
	stop_server
}
