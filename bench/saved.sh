# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# A fast stop of a server whose buffer holds ten million keys, all of which are
# saved, and the start after it, until they are loaded.  Beside it, what no
# program could do without: to write and sync as many bytes as the file has, and
# to visit as many counters in memory as there are, in random order.

saved_seconds() { # COMMAND...
	local began
	began=$(date +%s%N)
	"$@"
	awk -v ns=$(($(date +%s%N) - began)) 'BEGIN { print ns / 1e9 }'
}

saved_stop() {
	pg_ctl stop -w -m fast >/dev/null
}

saved_start() {
	pg_ctl start -w -l "$server_log" >/dev/null
	while [ -e "$PGDATA/statbuffer.saved" ] || [ -e "$PGDATA/statbuffer.loading" ]; do
		sleep 0.02
	done
}

saved_write() { # BYTES
	dd if=/dev/zero of="$work/written" bs=256K count="$1" iflag=count_bytes conv=fsync 2>/dev/null
	rm "$work/written"
}

saved_round() { # KEYS
	record stop statbuffer "$1" s "$(saved_seconds saved_stop)"
	bytes=$(stat -c %s "$PGDATA/statbuffer.saved")
	record bytes statbuffer "$1" bytes/key "$(awk -v bytes="$bytes" -v n="$1" 'BEGIN { print bytes / n }')"
	record stop write "$1" s "$(saved_seconds saved_write "$bytes")"
	record load statbuffer "$1" s "$(saved_seconds saved_start)"
	record load walk "$1" s "$("$work/walk" "$1")"
	must_be "what was loaded" "$1|$1" "SELECT count(*), sum(count) FROM hits"
}

measure_saved() {
	local keys=$((10 * million)) held bytes rounds=$few
	gcc -O2 -o "$work/walk" "$root/bench/walk.c"
	bench_server saved "shared_preload_libraries = 'statbuffer'"
	perform "ALTER FOREIGN TABLE hits OPTIONS (SET interval '1h', ADD shutdown '0')"
	for ((held = 0; held < keys; held += million)); do
		perform "INSERT INTO hits SELECT 'key ' || to_char(n, 'FM000000000000'), 1 FROM generate_series($((held + 1)), $((held + million))) AS n"
	done
	each_round saved_round "$keys"
	perform "TRUNCATE hits"
	stop_server
}
