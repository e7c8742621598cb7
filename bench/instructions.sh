# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# How many instructions an increment takes, and in which functions, beside the
# function that does nothing: what does not depend on the machine's mood.  The
# server runs under valgrind's callgrind, which counts from bench/probe.c's
# start to its stop in the session that calls them.

# start_callgrind: the server that is there, again
start_callgrind() {
	local i
	stop_server_only
	valgrind --quiet --tool=callgrind --instr-atstart=no --callgrind-out-file="$work/log/callgrind.%p" \
		"$(command -v postgres)" -D "$PGDATA" >>"$server_log" 2>&1 </dev/null &
	for ((i = 0; i < 600; i++)); do
		! pg_isready -q || return 0
		sleep 0.1
	done
	tail -n 50 "$server_log"
	die "could not start a server under valgrind"
}

stop_server_only() {
	pg_ctl stop -w -m fast >/dev/null
}

# take_account WHAT WHO N: what the last session had counted, by function, for
# each of N.
take_account() {
	local what=$1 who=$2 n=$3 file
	file=$(find "$work/log" -name 'callgrind.*.1')
	[ -f "$file" ] || die "$group: callgrind did not count"
	mv "$file" "$work/account"
	rm -f "$work"/log/callgrind.*
	record "$what" "$who" "$n" instructions "$(sed -n 's/^\(summary\|totals\): \([0-9]*\).*/\2/p' "$work/account" | tail -n 1 |
		awk -v n="$n" '{ print $1 / n }')"
	callgrind_annotate --threshold=100 "$work/account" 2>/dev/null |
		perl "$root/bench/functions.pl" "$what" "$who" "$n" >"$work/functions"
	cat "$work/functions" >>"$work/functions.csv"
	record "$what" "$who-own" "$n" instructions \
		"$(awk -F , '$3 == "statbuffer" { sum += $5 } END { print sum + 0 }' "$work/functions")"
}

# instructions_statement WHAT WHO KEY: first once for the caches
instructions_statement() {
	local statement="SELECT count(sb_increment($3, 1, 'hits')) FROM generate_series(1, $calls) AS n"
	PGOPTIONS=$(search_path_of "$2") sql -c "$statement" -c "SELECT callgrind_start()" \
		-c "$statement" -c "SELECT callgrind_stop()" >/dev/null
	take_account "$1" "$2" "$calls"
	[ "$2" = no-op ] || called=$((called + 2 * calls))
}

instructions_transaction() {
	local warm=20 times=$((calls / 100))
	PGOPTIONS=$(search_path_of "$1") pgbench_amount="-t $((warm + times))" \
		run_pgbench 1 -f "$root/bench/increment_callgrind.pgbench" \
		-D i=0 -D first=$warm -D last=$((warm + times))
	take_account transaction "$1" "$times"
	[ "$1" = no-op ] || called=$((called + warm + times))
}

measure_instructions() {
	local called=0 calls=100000 who
	bench_server instructions "shared_buffers = '16MB'"
	load probe.sql probe="'$work/probe'"
	perform "ALTER FOREIGN TABLE hits OPTIONS (SET interval '1h')"
	start_callgrind
	for who in no-op statbuffer; do
		instructions_statement one "$who" "'x'"
		instructions_statement "$ten_thousand" "$who" "'key ' || n % $ten_thousand"
		instructions_transaction "$who"
	done
	must_have_counted hits "$called"
	stop_server
}
