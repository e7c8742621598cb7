# pg_upgrade: buffers come along with their options, owners and grants; what was
# held by the old server does not, unless it is of a durable buffer, and nothing of it
# is written while pg_upgrade works.
#
# From this version to itself, or from the one in STATBUFFER_OLD_BINDIR (the
# directory of another version's executables, where statbuffer is installed,
# too).  The minor release of the new one must not be older than the old one's:
# what the last of them have added to the catalogs, those before do not know.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use File::Basename qw(dirname);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $new_bindir = qx{pg_config --bindir};
chomp $new_bindir;
my $old_bindir = $ENV{STATBUFFER_OLD_BINDIR} || $new_bindir;
note("from $old_bindir to $new_bindir");

my $old = PostgreSQL::Test::Cluster->new('old',
	$ENV{STATBUFFER_OLD_BINDIR} ? (install_path => dirname($old_bindir)) : ());
my $new = PostgreSQL::Test::Cluster->new('new');

# Both clusters must have checksums, or none; the default has changed.
$old->init;
$new->init(extra => $new->pg_version >= 18 && $old->pg_version < 18 ? ['--no-data-checksums'] : []);
foreach my $server ($old, $new)
{
	$server->append_conf('postgresql.conf', q{
shared_preload_libraries = 'statbuffer'
max_worker_processes = 16
max_prepared_transactions = 5
log_line_prefix = '%m [%p] %b %q%a '
});
}

# --- the old server ---------------------------------------------------------

$old->start;
$old->safe_psql($db, q{
	CREATE EXTENSION statbuffer;
	CREATE ROLE keeper LOGIN;
	CREATE ROLE app;
	GRANT USAGE ON FOREIGN SERVER statbuffer TO keeper;
	GRANT CREATE ON SCHEMA public TO keeper;
});
$old->safe_psql($db, q{
	SET ROLE keeper;
	CREATE TABLE stored (key text PRIMARY KEY, total bigint);
	CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
		INSERT INTO stored AS s VALUES (key, counter)
		ON CONFLICT (key) DO UPDATE SET total = s.total + EXCLUDED.total
	$$;
	CREATE FOREIGN TABLE hits (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', interval '1s', shutdown '0', batch_size '17');
	COMMENT ON FOREIGN TABLE hits IS 'what is looked at';
	GRANT INSERT ON hits TO app;
	CREATE FOREIGN TABLE halted (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', stopped 'true');
	CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void LANGUAGE sql AS 'SELECT store(key, counter)';
	SELECT sb_start();
	INSERT INTO hits VALUES ('k', 5);
	SELECT sb_drain('hits');
});

# A durable buffer has its counts in tables: of this session, of a prepared
# transaction, of two shapes of keys, and of a former run of the server.
$old->safe_psql($db, q{
	CREATE TABLE durable_target (key text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
	SELECT sb_create('durable', 'durable_target', 'n', 'durable=true', 'interval=1h');
	CREATE FUNCTION store_shaped(key int, count bigint) RETURNS void LANGUAGE sql AS $$
		INSERT INTO durable_target AS t VALUES ('shaped ' || key, count)
		ON CONFLICT (key) DO UPDATE SET n = t.n + EXCLUDED.n
	$$;
	CREATE FUNCTION store_shaped(key bigint, count bigint) RETURNS void LANGUAGE sql AS $$
		INSERT INTO durable_target AS t VALUES ('shaped ' || key, count)
		ON CONFLICT (key) DO UPDATE SET n = t.n + EXCLUDED.n
	$$;
	CREATE FOREIGN TABLE shaped (key int NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_shaped', durable 'true', interval '1h', shutdown '0');
	ALTER FOREIGN TABLE durable OPTIONS (ADD shutdown '0');
	INSERT INTO durable SELECT 'key ' || i, i FROM generate_series(1, 1000) AS i;
	INSERT INTO shaped VALUES (1, 5);
	ALTER FOREIGN TABLE shaped ALTER COLUMN key TYPE bigint;
	INSERT INTO shaped VALUES (1, 10), (10000000000, 1);
	BEGIN;
	INSERT INTO durable VALUES ('prepared', 3);
	PREPARE TRANSACTION 'p';
	COMMIT PREPARED 'p';
});
$old->restart;
$old->safe_psql($db, q{
	INSERT INTO durable VALUES ('key 1', 100), ('key 2', -2);
	BEGIN;
	INSERT INTO durable VALUES ('prepared', 4);
	PREPARE TRANSACTION 'p';
	COMMIT PREPARED 'p'});

my $definitions = q{
	SELECT c.oid, c.relname, c.relowner::regrole, c.relacl, obj_description(c.oid, 'pg_class'),
		(SELECT string_agg(o, ',' ORDER BY o) FROM unnest(t.ftoptions) AS o)
	FROM pg_class c JOIN pg_foreign_table t ON t.ftrelid = c.oid ORDER BY relname
};
my $original = $old->safe_psql($db, $definitions);

# What is held when it is stopped is saved.
$old->safe_psql($db, q{SELECT sb_increment('k', 7, 'hits')});
$old->stop;
my $saved = $old->data_dir . '/statbuffer.saved';
ok(-f $saved, 'the old server has saved what it held');
my $content = slurp_file($saved);

# --- pg_upgrade -------------------------------------------------------------

my $offset = -s $old->logfile;
chdir(PostgreSQL::Test::Utils::tempdir) or die "could not change directory: $!";
command_ok([
		'pg_upgrade', '--no-sync', '-d', $old->data_dir, '-D', $new->data_dir,
		'-b', $old_bindir, '-B', $new_bindir, '-s', $new->host,
		'-p', $old->port, '-P', $new->port ],
	'pg_upgrade');
is(slurp_file($saved), $content, 'the old server, when pg_upgrade started it, has not touched what was saved');
is(join('', map { slurp_file($_) } glob($new->data_dir . '/pg_upgrade_output.d/*/log/*.log')) =~ /statbuffer has/ ? 1 : 0, 0,
	'neither of the two has loaded or saved anything');

# --- the new server ---------------------------------------------------------

$new->start;
# (17 has a privilege more, which owners have.)
is($new->safe_psql($db, $definitions) =~ s/arwdDxtm/arwdDxt/gr, $original =~ s/arwdDxtm/arwdDxt/gr,
	'the buffers are as they were');
is($new->safe_psql($db, q{SELECT extversion FROM pg_extension WHERE extname = 'statbuffer'}), '1.0', 'so is the extension');
is($new->safe_psql($db, 'SELECT * FROM stored'), 'k|5', 'what was stored is there');
is($new->safe_psql($db, q{SELECT count(*) FROM hits}), 0, 'what was held is not');

# What is recovered is due at once, so it is looked at together with what is stored.
my $durable = q{
	SELECT count(*), sum(total), sum(total) FILTER (WHERE key = 'key 1'), sum(total) FILTER (WHERE key = 'key 2'),
		sum(total) FILTER (WHERE key = 'prepared')
	FROM (SELECT key, sb_total(key, 'durable') AS total
		FROM (SELECT 'key ' || i AS key FROM generate_series(1, 1000) AS i UNION ALL SELECT 'prepared') AS keys) AS totals
};
is($new->safe_psql($db, $durable), '1001|500605|101|0|7', 'but that of a durable buffer');
$new->stop('immediate');
$new->start;
is($new->safe_psql($db, $durable), '1001|500605|101|0|7', 'also after a crash of the new server');
is($new->safe_psql($db, q{SELECT sb_drain('durable'), sb_drain('shaped')}), 't|t', 'it is stored');
is($new->safe_psql($db, q{SELECT sum(n) FROM durable_target WHERE key !~ '^shaped'}), 500605, 'once');
is($new->safe_psql($db, q{SELECT string_agg(key || '=' || n, ' ' ORDER BY key) FROM durable_target WHERE key ~ '^shaped'}),
	'shaped 1=15 shaped 10000000000=1', 'keys of a former shape, too');

$new->safe_psql($db, q{
	SET ROLE app;
	INSERT INTO hits VALUES ('k', 10);
	RESET ROLE;
	SELECT sb_increment('default', 100);
});
is($new->safe_psql($db, q{SELECT sb_drain('hits'), sb_drain()}), 't|t', 'it counts and flushes');
is($new->safe_psql($db, 'SELECT sum(total) FROM stored'), 115, 'exactly');
my ($status, $out, $err) = $new->psql($db, q{SELECT sb_increment('k', 1, 'halted')});
like($err, qr/buffer "halted" is stopped/, 'what was stopped is stopped');
$new->safe_psql($db, 'ALTER EXTENSION statbuffer UPDATE');
$new->stop;

# The old one has not lost what it held, as long as it is not linked.
$old->start;
is($old->safe_psql($db, q{SELECT sb_drain('hits')}), 't', 'the old server still has what it held');
is($old->safe_psql($db, 'SELECT * FROM stored'), 'k|12', 'and stores it');
$old->stop;

done_testing();
