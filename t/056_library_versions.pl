# A library and SQL objects that are not of one version, as upgrades make them:
# ALTER EXTENSION UPDATE while counts are held, SQL objects that are newer or
# older than the library, and a library that is replaced while the server runs,
# so that sessions with the old one and with the new one meet.  There may be
# errors, which say what is to be done; no crash, and no count is lost.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';

my ($install_path, $libdir, $extensions) = copy_installation(PostgreSQL::Test::Utils::tempdir);

my $node = PostgreSQL::Test::Cluster->new('main', install_path => $install_path);
$node->init;
$node->append_conf('postgresql.conf', q{
max_worker_processes = 16
log_line_prefix = '%m [%p] %b %q%a '
});
$node->start;
use_node($node);

sub extension_version
{
	return sql(q{SELECT extversion FROM pg_extension WHERE extname = 'statbuffer'});
}

# --- ALTER EXTENSION UPDATE -------------------------------------------------

# A version that is for this test alone: it adds to the view and has a function
# more.
my $script = slurp_file("$extensions/statbuffer--1.0.sql");
my ($view) = $script =~ /(SELECT\n\t\tc\.oid.*?::pg_catalog\.oid);/s;
ok($view, 'the view is found in the script');
my $shorter_view = $view =~ s/s\.last_error_at,\s+s\.stats_reset/s.last_error_at/r;
my $longer_view = $view =~ s/s\.stats_reset\n/s.stats_reset, 'new'::pg_catalog.text AS added\n/r;

replace_file("$extensions/statbuffer--1.0--1.0.1test.sql", qq{
\\echo Use "ALTER EXTENSION statbuffer UPDATE TO '1.0.1test'" to load this file. \\quit
CREATE FUNCTION sb_count_all(key text) RETURNS bigint
AS 'MODULE_PATHNAME', 'sb_count' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
CREATE OR REPLACE VIEW sb_stat_buffers AS $longer_view;
});

sql('CREATE EXTENSION statbuffer');
is(extension_version(), '1.0', 'the default version is made');
make_buffer($node, $db, 'hits', q{interval '1h', timeout '1h', backoff '100ms'});
sql(q{CREATE ROLE reader; GRANT SELECT ON sb_stat_buffers TO reader});
increment($node, $db, 'hits', 'k', 5);
is(sql(q{SELECT sb_drain('hits')}), 't', 'it works');
increment($node, $db, 'hits', 'k', 7);

# One session has counted and not yet committed, another has plans.
my $counting = $node->background_psql($db);
$counting->query_safe(q{BEGIN; SELECT sb_increment('k', 100, 'hits')});
my $planned = $node->background_psql($db);
$planned->query_safe(q{PREPARE look AS SELECT count(*) FROM sb_stat_buffers; EXECUTE look});
$planned->query_safe(q{PREPARE add AS SELECT sb_increment('k', 1000, 'hits'); EXECUTE add});

sql(q{ALTER EXTENSION statbuffer UPDATE TO '1.0.1test'});
is(extension_version(), '1.0.1test', 'ALTER EXTENSION UPDATE goes through');
is(sql(q{SELECT added FROM sb_stat_buffers WHERE buffer = 'hits'}), 'new', 'the new column is there');
is(sql(q{SELECT has_table_privilege('reader', 'sb_stat_buffers', 'SELECT')}), 't', 'and the grants still are');
is(sql(q{SELECT obj_description('sb_stat_buffers'::regclass)}) ne '', 1, 'so are the comments');
is($planned->query_safe('EXECUTE look'), '1', 'a plan that knew the old view goes on');
$planned->query_safe('EXECUTE add');
$counting->query_safe('COMMIT');
is(sql(q{SELECT sb_count('k', 'hits')}), 7 + 100 + 2000, 'what was counted before, in the middle and after is held');
is(sql(q{SELECT sb_drain('hits')}), 't', 'and flushed');
is(stored($node, $db, 'hits'), 5 + 7 + 100 + 2000, 'exactly');

# A database can also be made at that version, by both scripts.
$node->safe_psql($db, 'CREATE DATABASE fresh');
$node->safe_psql('fresh', q{CREATE EXTENSION statbuffer VERSION '1.0.1test'});
is($node->safe_psql('fresh', q{SELECT to_regprocedure('sb_count_all(text)') IS NOT NULL}), 't', 'the new function is there');
is($node->safe_psql('fresh', q{SELECT count(*) FROM sb_stat_buffers}), '0', 'and the view is there');
$node->safe_psql($db, 'DROP DATABASE fresh');

# --- SQL objects of another version than the library ------------------------

# A function that the library does not have: PostgreSQL says so at once, and
# all is as it was.
replace_file("$extensions/statbuffer--1.0.1test--1.1test.sql", q{
CREATE FUNCTION sb_of_tomorrow() RETURNS void AS 'MODULE_PATHNAME' LANGUAGE C;
});
like(error_of(q{ALTER EXTENSION statbuffer UPDATE TO '1.1test'}),
	qr/could not find function "sb_of_tomorrow" in file .*statbuffer/, 'a function that the library lacks');
is(extension_version(), '1.0.1test', 'the extension has the version that it had');

# Functions with columns that the library does not know, one more and one less.
my ($statistics) = $script =~ /(CREATE FUNCTION sb_stat_get_buffer.*?;)/s;
my ($keys) = $script =~ /(CREATE FUNCTION sb_keys.*?;)/s;
my $more = $statistics =~ s/OUT stats_reset timestamptz/OUT stats_reset timestamptz, OUT added text/r;
my $less = $statistics =~ s/,\s*OUT stats_reset timestamptz//r;
my $more_keys = $keys =~ s/OUT last_error text/OUT last_error text, OUT added text/r;
my $less_keys = $keys =~ s/,\s*OUT last_error text//r;
my $drop = q{
	DROP VIEW sb_stat_buffers;
	DROP FUNCTION sb_stat_get_buffer(oid);
	DROP FUNCTION sb_keys(regclass);
};
isnt($more, $statistics, 'a column more');
isnt($less_keys, $keys, 'a column less');
replace_file("$extensions/statbuffer--1.0.1test--1.2test.sql", "$drop $more $more_keys
	CREATE VIEW sb_stat_buffers AS $view;");
replace_file("$extensions/statbuffer--1.2test--1.3test.sql", "$drop $less $less_keys
	CREATE VIEW sb_stat_buffers AS $shorter_view;");
replace_file("$extensions/statbuffer--1.3test--1.0.sql", "$drop $statistics $keys
	CREATE VIEW sb_stat_buffers AS $view;");

foreach my $version ('1.2test', '1.3test')
{
	sql("ALTER EXTENSION statbuffer UPDATE TO '$version'");
	increment($node, $db, 'hits', 'k', 1);
	like(error_of('SELECT * FROM sb_stat_buffers'),
		qr/function sb_stat_get_buffer\(oid\) returns \d+ columns, but its library has 18.*HINT:.*ALTER EXTENSION/s,
		"$version: the view says what is wrong");
	like(error_of(q{SELECT * FROM sb_keys('hits')}),
		qr/function sb_keys\(regclass\) returns \d columns, but its library has 6.*HINT/s, "$version: so does sb_keys()");
	is(sql(q{SELECT sb_drain('hits')}), 't', "$version: counting and flushing go on");
}
sql(q{ALTER EXTENSION statbuffer UPDATE TO '1.0'});
is(sql(q{SELECT flushed_count FROM sb_stat_buffers}), stored($node, $db, 'hits'), 'with the right objects all is well');
is(stored($node, $db, 'hits'), 5 + 7 + 100 + 2000 + 2, 'and nothing got lost');
$counting->quit;
$planned->quit;

# --- a library that is replaced while the server runs -----------------------

# The next library, the shared memory of which looks different
my $library = slurp_file("$libdir/statbuffer.so");
my $next_library = $library;
is($next_library =~ s/(statbuffer shared memory, layout )(\d+)/$1 . 'X' x length $2/ge, 1, 'a library of another layout');
is(length $next_library, length $library, 'and of the same size');

my $replaced = qr/statbuffer's library was replaced by another version while the server was running.*DETAIL:.*layout \d+ .*layout X+ .*HINT: +Restart the server/s;

# A session that counts has the old one, and so have launcher and worker.
increment($node, $db, 'hits', 'k', 10);
sql(q{CREATE TABLE plain (a int)});
my $old = $node->background_psql($db);
$old->query_safe(q{SELECT sb_increment('k', 20, 'hits')});

# A worker without work would leave.
my $gate = close_gate($node, $db);
sql(q{SELECT sb_increment('at work', 1, 'hits'), sb_flush('at work', 'hits')});
wait_at_gate($node, $db, 'hits');
replace_file("$libdir/statbuffer.so", $next_library);

foreach my $statement (
	q{SELECT sb_increment('k', 1, 'hits')},
	q{SELECT sb_async_increment('k', 1, 'hits')},
	q{INSERT INTO hits VALUES ('k')},
	q{SELECT sb_count('k', 'hits')},
	q{SELECT * FROM hits},
	q{SELECT * FROM sb_keys('hits')},
	q{SELECT sb_drain('hits')},
	q{SELECT sb_start('hits')},
	q{SELECT * FROM sb_stat_buffers})
{
	like(error_of($statement), $replaced, 'which says what to do');
}

# What is not about counts is not held up in a session that has the new library.
sql(q{
	LOAD '$libdir/statbuffer';
	CREATE FOREIGN TABLE more (key text, count bigint) SERVER statbuffer;
	ALTER FOREIGN TABLE more OPTIONS (ADD interval '1h');
	DROP FOREIGN TABLE more;
	ALTER TABLE plain ADD COLUMN b int;
	DROP TABLE plain;
});
is($node->psql($db, q{LOAD '$libdir/statbuffer'; CREATE DATABASE other}), 0, 'a database is made');
is($node->psql($db, q{LOAD '$libdir/statbuffer'; DROP DATABASE other}), 0, 'and dropped');

# Those that have the old one go on, as long as they are there.
is($old->query_safe(q{SELECT sb_count('k', 'hits')}), '30', 'an old session sees what is counted');
$old->query_safe(q{SELECT sb_increment('k', 39, 'hits')});
open_gate($gate);
is($old->query_safe(q{SELECT sb_drain('hits')}), 't', 'and has it flushed');
is(stored($node, $db, 'hits'), 2114 + 70, 'by the old worker');

# A new worker has the new library, and does not touch what it does not know.
my $offset = -s $node->logfile;
sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'statbuffer worker'});
wait_for_no_worker($node, 'the old worker is gone');
$old->query_safe(q{SELECT sb_increment('k', 50, 'hits'); SELECT sb_flush_all('hits')});
ok($node->wait_for_log(qr/statbuffer worker.*was replaced by another version/, $offset), 'a new one says it in the log');
my $state = '';
foreach (1 .. 1800)
{
	$state = $old->query_safe(q{SELECT state || ' ' || last_error FROM sb_stat_buffers});
	last if $state =~ /^failing/;
	$old->query_safe('SELECT pg_sleep(0.1)');
}
like($state, qr/^failing .*could not connect to the database/, 'and the buffer is seen to fail');
is($old->query_safe(q{SELECT sb_count('k', 'hits')}), '50', 'with its count');

# So does a new launcher, and is not started again and again.  The old one stays.
my ($launcher) = processes($node, 'statbuffer launcher');
$offset = -s $node->logfile;
sql("SELECT pg_terminate_backend($launcher)");
ok($node->wait_for_log(qr/statbuffer launcher.*was replaced by another version/, $offset), 'a new launcher says it, too');
is((processes($node, 'statbuffer launcher'))[0], $launcher, 'the old one stays');

# The restart: the old one saves, the new one loads, and nothing is lost.
$old->query_safe(q{SELECT sb_increment('k', 60, 'hits')});
$old->quit;
$node->restart;
is(sql(q{SELECT sb_count('k', 'hits')}), '110', 'after the restart, what was held is held');
is(sql(q{SELECT sb_drain('hits')}), 't', 'and is flushed with the new library');
is(stored($node, $db, 'hits'), 2114 + 70 + 110, 'exactly');

# The other way round: back to the library before.
replace_file("$libdir/statbuffer.so", $library);
like(error_of(q{SELECT sb_increment('k', 1, 'hits')}), qr/was replaced by another version.*Restart the server/s, 'downgraded, it is the same');
$node->restart;
increment($node, $db, 'hits', 'k', 1);

# Preloaded, no session ever sees the new one before the restart.
$node->append_conf('postgresql.conf', q{shared_preload_libraries = 'statbuffer'});
$node->restart;
replace_file("$libdir/statbuffer.so", $next_library);
increment($node, $db, 'hits', 'k', 1);
is(sql(q{SELECT sb_drain('hits')}), 't', 'preloaded, the old library stays in use');
is(stored($node, $db, 'hits'), 2114 + 70 + 110 + 2, 'and all is well');
$node->restart;
increment($node, $db, 'hits', 'k', 1);
is(sql(q{SELECT sb_drain('hits')}), 't', 'so it is with the new one');

$node->stop;
is(lines_in_log($node, 'TRAP: |PANIC: |terminated by signal'), 0, 'no process crashed');
done_testing();
