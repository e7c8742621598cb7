# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# Many increments in one statement, over the same statement with a function
# that does nothing; the commit is included.

statement_round() {
	local who what key
	for what in one $ten_thousand; do
		key="'x'"
		[ "$what" = one ] || key="'key ' || n % $what"
		while read -r who; do
			export PGOPTIONS
			PGOPTIONS=$(search_path_of "$who")
			record "$what" "$who" "$million" ms "$(milliseconds_without_rows \
				"SELECT sb_increment($key, 1, 'hits') FROM generate_series(1, $million) AS n")"
			unset PGOPTIONS
		done < <(in_turn no-op statbuffer)
	done
}

measure_statement() {
	# it is over soon, and single times scatter
	local rounds=$((rounds * 4))

	bench_server statement
	each_round statement_round
	drain hits
	must_have_counted hits $((2 * rounds * million))
	must_be "the sum of what is stored" $((2 * rounds * million)) "SELECT sum(n) FROM stored"
	must_be "the stored counts of one key" $((rounds * million)) "SELECT n FROM stored WHERE key = 'x'"
	must_be "the keys that are stored" $((ten_thousand + 1)) "SELECT count(*) FROM stored"
	stop_server
}
