# Targets that are written anew while counts are flushed into them (VACUUM FULL,
# CLUSTER, REPACK, pg_repack), hypertables of TimescaleDB, and tables of Citus.
# What the server does not have is not tested, and told.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

# REPACK (CONCURRENTLY) reads WAL.
my $node = new_node('kinds', 'wal_level = replica', 'max_wal_senders = 4');
my $major = major($node);

# is_available(EXTENSION): if it is not, what is not tested is told.
sub is_available
{
	my ($extension) = @_;

	return 1 if sql("SELECT count(*) FROM pg_available_extensions WHERE name = '$extension'");
	diag("not installed, and not tested: $extension for PostgreSQL $major");
	return 0;
}

#
# Two sessions count in a buffer, while its target is written anew
#
sql(q{
	CREATE ROLE owner LOGIN;
	GRANT USAGE ON FOREIGN SERVER statbuffer TO owner;
	GRANT CREATE ON SCHEMA public TO owner;
	CREATE TABLE stop ();
	CREATE TABLE counted (n bigint);

	CREATE PROCEDURE count_on(buffer regclass) LANGUAGE plpgsql AS $$
	DECLARE
		n bigint := 0;
	BEGIN
		WHILE NOT EXISTS (SELECT FROM stop) LOOP
			EXECUTE format('INSERT INTO %s SELECT i FROM generate_series(%s, %s) i', buffer, n % 200, n % 200 + 9);
			COMMIT;
			n := n + 10;
			PERFORM pg_sleep(0.02);
		END LOOP;
		INSERT INTO counted VALUES (n);
	END $$;
});

# written_anew(NAME, TIMES, WRITE): calls a function that writes the table NAME
# anew so many times, under load.
sub written_anew
{
	my ($name, $times, $write) = @_;
	my $before;

	sql(qq{
		TRUNCATE stop, counted;
		SET ROLE owner;
		CREATE TABLE $name (id bigint PRIMARY KEY, note text DEFAULT 'new', n bigint NOT NULL DEFAULT 0);
		INSERT INTO $name SELECT i, 'old' FROM generate_series(0, 99) i;
		SELECT sb_create('${name}_counts', '$name', 'n', 'interval=10ms', 'backoff=1ms');
	});
	my @sessions = map { start_session($node, 'postgres', "CALL count_on('${name}_counts')") } 1 .. 2;
	my $calls = "SELECT handler_calls FROM sb_stat_buffers WHERE buffer = '${name}_counts'";
	foreach my $i (1 .. sized($times, 1))
	{
		wait_for($node, 'postgres', "SELECT ($calls) > " . (sql($calls) + 5), "$name: flushes follow each other");
		$before = sql("SELECT pg_relation_filenode('$name')");
		$write->($name);
		isnt(sql("SELECT pg_relation_filenode('$name')"), $before, "$name: the table is another file now");
	}
	wait_for($node, 'postgres', "SELECT ($calls) > " . (sql($calls) + 5), "$name: and go on");
	sql('INSERT INTO stop DEFAULT VALUES');
	finish_session($_, "$name: counted") for @sessions;
	is(sql("SELECT sb_drain('${name}_counts')"), 't', "$name: drained");
	is(sql("SELECT sum(n) FROM $name"), sql('SELECT sum(n) FROM counted'), "$name: each count is stored once");
	is(sql("SELECT count(*) FILTER (WHERE note = 'old'), count(*) - count(DISTINCT id) FROM $name"), '100|0',
		"$name: the rows that were there are the same");
	note(sql("SELECT failures || ' failures, the last: ' || coalesce(last_error, 'none') FROM sb_stat_buffers
		WHERE buffer = '${name}_counts'"));
	sql("DROP FOREIGN TABLE ${name}_counts");
}

written_anew('vacuumed', 4, sub { sql("VACUUM FULL $_[0]") });
written_anew('clustered', 4, sub { sql("CLUSTER $_[0] USING $_[0]_pkey") });
SKIP:
{
	skip 'REPACK is of PostgreSQL 19', 1 if $major < 19;
	written_anew('repacked', 4, sub { sql("REPACK $_[0]") });
	written_anew('repacked_concurrently', 4, sub { sql("REPACK (CONCURRENTLY) $_[0]") });
}
SKIP:
{
	skip 'pg_repack is not installed', 1 unless is_available('pg_repack');
	sql('CREATE EXTENSION pg_repack');
	written_anew('reorganized', 2, sub {
			$node->command_ok([ 'pg_repack', '-d', $node->connstr('postgres'), '-t', $_[0] ], 'pg_repack has run');
		});
	sql('DROP EXTENSION pg_repack');
}

#
# A table of Citus gets its batch in arrays.  So it does when the catalog only says
# that it is one.
#
sql(q{
	SET allow_system_table_mods = on;
	CREATE TABLE pg_catalog.pg_dist_partition (partmethod "char", logicalrelid regclass);
	GRANT SELECT ON pg_catalog.pg_dist_partition TO PUBLIC;
	CREATE TABLE arrays (a int, b text, n int CHECK (n >= 0), PRIMARY KEY (a, b));
	CREATE TABLE plain (a int[] PRIMARY KEY, n int);
	INSERT INTO pg_catalog.pg_dist_partition VALUES ('h', 'arrays'), ('h', 'plain');
	SELECT sb_create('array_counts', 'arrays', 'n', 'interval=1h', 'backoff=1h', 'batch_size=10');
	INSERT INTO array_counts SELECT i % 50, 'b' || i % 2, 1 FROM generate_series(1, 1000) i;
});
is(sql(q{SELECT sb_drain('array_counts'), sb_total('(7,b1)', 'array_counts'), sb_total('(7,b2)', 'array_counts')}),
	't|20|0', 'arrays: drained');
sql(q{INSERT INTO array_counts VALUES (0, 'b0', -20), (1, 'b1', -19), (1, 'new', 5), (2, 'b0', 1)});
is(sql(q{SELECT sb_drain('array_counts')}), 't', 'arrays: a net decrease under a check');
is(sql('SELECT sum(n), count(*), min(n) FROM arrays'), '967|51|0', 'arrays: each count is stored once');
sql(q{INSERT INTO array_counts VALUES (3, 'b1', -100), (4, 'b0', 7); SELECT sb_flush_all('array_counts')});
wait_for($node, 'postgres', q{
	SELECT count(*) = 1 AND bool_and(key = '(3,b1)' AND last_error LIKE '%violates check constraint%')
	FROM sb_keys('array_counts') WHERE count <> 0 AND in_flight = 0 AND failures > 0}, 'arrays: a key that fails');
is(sql(q{SELECT sb_total('(4,b0)', 'array_counts'), n FROM arrays WHERE a = 4}), '27|27', 'arrays: fails alone');
like(error_of(q{SELECT sb_create('plain_counts', 'plain', 'n')}), qr/column "a" of distributed target table "plain" is of type integer\[\]/,
	'arrays: of arrays there are none');
sql(q{
	DROP FOREIGN TABLE array_counts;
	SET allow_system_table_mods = on;
	DROP TABLE pg_catalog.pg_dist_partition;
});

#
# TimescaleDB: its chunks are tables that inherit
#
SKIP:
{
	skip 'TimescaleDB is not installed', 1 unless is_available('timescaledb');
	$node->append_conf('postgresql.conf', qq{
		shared_preload_libraries = 'timescaledb,statbuffer'
		timescaledb.telemetry_level = 'off'});
	$node->restart;
	sql('CREATE DATABASE hyper');
	use_node($node, 'hyper');
	sql(q{
		CREATE EXTENSION timescaledb;
		CREATE EXTENSION statbuffer;
		GRANT USAGE ON FOREIGN SERVER statbuffer TO owner;
		GRANT CREATE ON SCHEMA public TO owner;
		SET ROLE owner;
		CREATE TABLE visits (day date, page int, note text DEFAULT 'new', visits bigint NOT NULL DEFAULT 0 CHECK (visits >= 0),
			PRIMARY KEY (page, day));
		SELECT create_hypertable('visits', 'day', chunk_time_interval => interval '7 days');
		INSERT INTO visits VALUES ('2026-01-01', 1, 'old');
		SELECT sb_create('visit_counts', 'visits', 'visits', 'interval=1h', 'backoff=1h', 'batch_size=50');
		SELECT sb_create_view('visit', 'visit_counts');
	});
	foreach my $i (1 .. 3)
	{
		# each time with days for which there are no chunks yet
		sql(qq{INSERT INTO visit_counts SELECT page, date '2026-01-01' + day, 1
			FROM generate_series(1, 10) page, generate_series(0, 20 * $i - 1) day});
		is(sql(q{SELECT sb_total('(1,2026-01-01)', 'visit_counts')}), $i, "hypertable: the total after $i");
		is(sql(q{SELECT sb_drain('visit_counts')}), 't', 'hypertable: drained');
	}
	is(sql('SELECT sum(visits), count(*), max(visits), min(visits) FROM visits'), '1200|600|3|1',
		'hypertable: each count is stored once');
	is(sql(q{SELECT note FROM visits WHERE day = '2026-01-01' AND page = 1}), 'old', 'hypertable: the row that was there');
	cmp_ok(sql(q{SELECT count(*) FROM show_chunks('visits')}), '>=', 9, 'hypertable: there are chunks');
	sql(q{INSERT INTO visit_counts VALUES (1, '2026-01-01', -3), (2, '2026-01-01', -1)});
	is(sql(q{SELECT sb_drain('visit_counts')}), 't', 'hypertable: a net decrease under a check');
	is(sql(q{SELECT sum(visits), min(visits) FROM visits}), '1196|0', 'hypertable: stored');
	sql(q{UPDATE visit SET visits = visits + 4, note = 'seen' WHERE page = 1 AND day = '2026-01-01'});
	is(sql(q{SELECT visits, note FROM visit WHERE page = 1 AND day = '2026-01-01'}), '4|seen', 'hypertable: its view counts');
	sql(q{INSERT INTO visit_counts VALUES (1, '2026-01-02', 5); SELECT drop_chunks('visits', older_than => date '2026-02-01')});
	is(sql(q{SELECT sb_total('(1,2026-01-02)', 'visit_counts')}), 5, 'hypertable: what is stored goes with its chunk');
	is(sql(q{SELECT sb_drain('visit_counts')}), 't', 'hypertable: drained');
	is(sql(q{SELECT visits FROM visits WHERE day = '2026-01-02'}), 5, 'hypertable: and what is counted comes to a new one');
	use_node($node);
}

#
# Citus, with one server
#
SKIP:
{
	skip 'Citus is not installed', 1 unless is_available('citus');
	$node->append_conf('postgresql.conf', qq{
		shared_preload_libraries = 'citus,statbuffer'
		max_prepared_transactions = 100
		citus.local_hostname = '127.0.0.1'
		listen_addresses = '127.0.0.1'});
	$node->append_conf('pg_hba.conf', 'host all all 127.0.0.1/32 trust');
	$node->restart;
	sql('CREATE DATABASE sharded');
	use_node($node, 'sharded');
	my $port = $node->port;
	sql('CREATE EXTENSION citus');
	sql(qq{
		SELECT citus_set_coordinator_host('127.0.0.1', $port);
		SELECT citus_set_node_property('127.0.0.1', $port, 'shouldhaveshards', true);
	});
	sql(q{SET citus.enable_ddl_propagation = off; CREATE EXTENSION statbuffer});
	sql(q{
		SET citus.shard_count = 4;
		CREATE TABLE pages (path text PRIMARY KEY, note text DEFAULT 'new', views bigint NOT NULL DEFAULT 0 CHECK (views >= 0));
		SELECT create_distributed_table('pages', 'path');
		INSERT INTO pages VALUES ('/1', 'old');
		CREATE TABLE tenants (path text, tenant int, views bigint NOT NULL DEFAULT 0, PRIMARY KEY (tenant, path));
		SELECT create_distributed_table('tenants', 'tenant');
		CREATE TABLE everywhere (path text PRIMARY KEY, views bigint NOT NULL DEFAULT 0);
		SELECT create_reference_table('everywhere');
		CREATE TABLE keyless (path text, tenant int, views bigint);
		SELECT create_distributed_table('keyless', 'tenant');
	});
	sql(q{
		SET citus.enable_ddl_propagation = off;
		SELECT sb_create('page_counts', 'pages', 'views', 'interval=1h', 'backoff=1h', 'batch_size=100');
		SELECT sb_create('tenant_counts', 'tenants', 'views', 'interval=1h', 'backoff=1h');
		SELECT sb_create('reference_counts', 'everywhere', 'views', 'interval=1h', 'backoff=1h');
		CREATE FOREIGN TABLE keyless_counts (path text NOT NULL, views bigint) SERVER statbuffer OPTIONS (target 'keyless');
	});
	foreach my $i (1 .. 2)
	{
		sql(q{
			INSERT INTO page_counts SELECT '/' || i, i FROM generate_series(1, 1000) i;
			INSERT INTO tenant_counts SELECT i % 10, '/' || i, i FROM generate_series(1, 1000) i;
			INSERT INTO reference_counts SELECT '/' || i, i FROM generate_series(1, 1000) i;
		});
		is(sql(q{SELECT sb_total('/7', 'page_counts'), sb_total('(7,/7)', 'tenant_counts'), sb_total('/7', 'reference_counts')}),
			join('|', (7 * $i) x 3), "Citus: the totals after $i");
		is(sql(q{SELECT sb_drain('page_counts'), sb_drain('tenant_counts'), sb_drain('reference_counts')}),
			't|t|t', 'Citus: drained');
	}
	is(sql("SELECT sum(views), count(*), sum(views) FILTER (WHERE path = '/7') FROM $_"), '1001000|1000|14',
		"Citus: each count is stored once, in $_")
	  for qw(pages tenants everywhere);
	is(sql(q{SELECT sb_total('/7', 'page_counts'), sb_total('(7,/7)', 'tenant_counts'), sb_total('/7', 'reference_counts')}),
		'14|14|14', 'Citus: the totals of what is stored');
	sql(q{INSERT INTO page_counts VALUES ('/1', -2), ('/2', -3)});
	is(sql(q{SELECT sb_drain('page_counts')}), 't', 'Citus: a net decrease under a check');
	is(sql(q{SELECT views, note FROM pages WHERE path = '/1'}), '0|old', 'Citus: stored');
	sql(q{INSERT INTO page_counts VALUES ('/1', -5), ('/2', 5), ('/3', 5); SELECT sb_flush_all('page_counts')});
	wait_for($node, 'sharded', q{
		SELECT count(*) = 1 AND bool_and(key = '/1' AND last_error LIKE '%violates check constraint%')
		FROM sb_keys('page_counts') WHERE count <> 0 AND in_flight = 0 AND failures > 0}, 'Citus: a key that fails');
	is(sql(q{SELECT string_agg(path || ' ' || views, ', ' ORDER BY path) FROM pages WHERE path IN ('/1', '/2', '/3')}),
		'/1 0, /2 6, /3 11', 'Citus: fails alone');
	like(error_of(q{SELECT path, sb_total(path, 'page_counts') FROM pages}),
		qr/cannot execute a distributed query from a query on a shard/, 'Citus: its shards have no totals');
	like(error_of(q{SELECT sb_start('keyless_counts')}), qr/has no unique constraint on the buffer's key columns/,
		'Citus: a key that it cannot find rows by');
	use_node($node);
}

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
